"""Fast paths of the gated layer: the same function as `neuron.py` and two matrix products, cheaper.

`linear` has the autograd functions; `torch_backend` and `triton_backend` have the products that they are made of.
"""
