"""Fast paths of the gated layer: the function of `neuron.py` and two matrix products, computed faster.

`linear` and `usual` have the autograd functions; `torch_backend` and `triton_backend` have the products that they are
made of.
"""
