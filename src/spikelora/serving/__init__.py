"""How does vLLM serve it? A plugin of vLLM, which puts the gate between the two products of its LoRA.

The room imports from the rooms above it, and imports vLLM when vLLM asks for the plugin. `import spikelora` does not
import this room.
"""
