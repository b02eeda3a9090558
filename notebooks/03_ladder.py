# %% [markdown]
# # The ladder
#
# Language models in the order of their invention, each given the same arithmetic on the same text: what is
# new in each rung is what the difference shows. `polyhead ladder` climbs it for as long as you like; here
# each rung has 20 GFLOP, a few seconds. `docs/ladder.md` has the table of a long climb.

# %%
# %matplotlib inline
import json
from pathlib import Path

import matplotlib.pyplot as plt

from polyhead.cli.corpora import pydocs
from polyhead.cli.main import main

Path("text.txt").write_text(pydocs(), encoding="utf-8")
code = main("ladder text.txt --flops 60G --context 64 --batch-size 16 --out ladder --json".split())
