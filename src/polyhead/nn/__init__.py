"""The parts every family is made of. Imports torch alone and knows no model.

Shapes, everywhere: `B` batch, `T` tokens, `Q`/`K` queries and keys, `H` query heads, `G` key/value
heads, `D` head width, `E` model width, `F` feed-forward width, `V` vocabulary, `N` experts.
"""
