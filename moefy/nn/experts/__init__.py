"""Experts: rows sorted by expert in, rows out.

linear.py            E linears in one parameter
stacked.py           experts as stacked weights: entries, a body, an exit
body.py              the code between entries and exit, as a picklable function
activation.py        a body from the name of an activation, a function or a module
modules.py           experts that are modules of the user's
buffers.py           rows as one buffer per expert, for experts that take a batch
input_weighting.py   routing weights on the inputs of experts
shared.py            a dense FFN that every token passes
replacement.py       tokens that skip the experts
"""
