"""What else can be made of an adapter? A spiking one of a LoRA, a LoRA of a spiking one, and one of lower ranks.

It imports the rooms `method`, `peft` and `sparsity`.
"""
