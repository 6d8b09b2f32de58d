"""The passes that write and fuse Mixture-of-Experts ops in a graph.

ffn_to_moe     capture    linear, gelu, linear of a caller's graph become routed ones
fuse_experts   pre_grad   routed linears and a known body between them become one op; expert_regions finds them
"""
