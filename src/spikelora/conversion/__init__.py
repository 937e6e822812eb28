"""What else can be made of an adapter? A spiking one from a LoRA, a LoRA from a spiking one, and one of lower ranks.

It imports the rooms `method`, `peft` and `sparsity`.
"""
