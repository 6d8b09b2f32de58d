"""The seed systems' layers under their own argument names and with their numerics, to port a script as it is.

    from moefy.compat import tutel as tutel_moe          # was: from tutel import moe as tutel_moe
    from moefy.compat.fastmoe import FMoETransformerMLP  # was: from fmoe import FMoETransformerMLP

``examples/migration.md`` maps every argument to moefy's own. New code wants ``moefy.MoE`` and ``moefy.transform``: they
count experts globally, compile without graph breaks and lay out over ranks. What is here runs in one process.
"""
