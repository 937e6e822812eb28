"""How does it live in PEFT? The configuration, the tuner, and all that registers, wraps, guards or refuses.

Only this room and `serving` change classes of other packages. It imports the room `method`.
"""
