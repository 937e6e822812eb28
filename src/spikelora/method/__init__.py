"""What is the method? The neuron, the gate, the gated layers, and faster ways to compute them.

Read `neuron.py`, `gate.py` and `variants.py`, in this order. The room imports nothing from the other rooms. All but
`paths.py`, `variants.py` and `layers.py`, which extend layers of PEFT and transformers, need torch alone, and
`ops/triton_backend.py` triton.
"""
