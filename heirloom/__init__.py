"""heirloom: small models inherit from big ones, in JAX.

What all methods share is `heirloom.common`, the shipped recipes are `heirloom.configs`; the methods are packages of
their own: `tinyclip_jax`, `lit_jax`, `learngene`, `weightgen`.
"""

from pathlib import Path

# In a checkout common/ and configs/ lie next to this folder; an installed wheel has them inside it.
if not (Path(__file__).parent / "common").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))
