"""How does vLLM serve it? A plugin of vLLM, which puts the gate between the two products of its LoRA.

The room imports from those above it, and vLLM where vLLM has asked for it; `import spikelora` imports nothing of it.
"""
