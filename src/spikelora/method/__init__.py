"""What is the method? The neuron, the gate, the gated layers, and faster ways to compute the same.

Read `neuron.py`, `gate.py` and `variants.py`, in this order. This room imports torch and nothing of the other rooms;
`paths.py`, `variants.py` and `layers.py` also import PEFT and transformers, whose layers they extend.
"""
