"""How does it live in PEFT? The configuration, the tuner, and all that registers, wraps, guards or refuses.

Nothing outside this room changes a class of another package. It imports the room `method`.
"""
