"""Ways to run the picked experts. Each module has ``dispatch`` with one signature; ``loop`` is the reference."""
