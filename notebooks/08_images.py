# %% [markdown]
# # What a ViT and a Swin look at
#
# Two small models learn handwritten digits of 8 × 8 pixels, in a minute. Then their attention is laid back
# over the image: a ViT's class token sees all patches from the first layer on; a Swin sees windows, which
# shift, and grow as patches are merged.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import polyhead as ph
from polyhead.explain.attribution import occlusion
from polyhead.explain.flow import rollout
from polyhead.explain.images import image_maps, over_image
from polyhead.explain.inputs import logit

digits = load_digits()
pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
train_x, test_x, train_y, test_y = train_test_split(
    pixels, digits.target, test_size=0.25, random_state=0, stratify=digits.target
)
processor = ph.Processor(size=None, mean=(0.5,), std=(0.5,))
SIZES = {
    "vit": dict(patch_size=2, d_model=64, d_ff=128, num_layers=4, num_heads=4),
    "swin": dict(
        patch_size=1, d_model=32, depths=(2, 2), num_heads=(2, 4), window=4, path_dropout=0.0
    ),
}


def moved(image: np.ndarray) -> list[np.ndarray]:
    return [
        image,
        np.roll(image, 1, 0),
        np.roll(image, -1, 0),
        np.roll(image, 1, 1),
        np.roll(image, -1, 1),
    ]


models, EPOCHS = {}, {"vit": 6, "swin": 12}
rows = [
    {"image": one, "label": str(label)}
    for image, label in zip(train_x, train_y, strict=True)
    for one in moved(image)
]
for family, sizes in SIZES.items():
    model = ph.build(
        family,
        head="classify",
        seed=0,
        labels=tuple("0123456789"),
        image_size=8,
        num_channels=1,
        init_std=0.1,
        **sizes,
    )
    config = ph.TrainConfig(
        epochs=EPOCHS[family],
        batch_size=64,
        lr=2e-3,
        warmup=50,
        weight_decay=0.05,
        validate_every=0,
        checkpoint_every=0,
        out=family,
    )
    fitted = ph.Trainer(model, processor, config, objective="image-classify", quiet=True).fit(rows)
    models[family] = ph.load(fitted["checkpoint"])
    with torch.no_grad():
        accuracy = (models[family](processor(list(test_x))).argmax(-1).numpy() == test_y).mean()
    print(
        f"{family}: {models[family].num_parameters():,} parameters, {accuracy:.1%} of {len(test_y)} digits it has not seen"
    )

# %% [markdown]
# `make recipe NAME=digits` trains them to the end; its figures are in `docs/results.md`.
#
# ## The ViT's class token, layer by layer

# %%
chosen = [int(np.flatnonzero(test_y == digit)[0]) for digit in (3, 8)]
images = processor([test_x[i] for i in chosen])
maps = image_maps(models["vit"], images)
figure, grid = plt.subplots(2, 5, figsize=(9, 3.8), layout="constrained")
for row, own in zip(range(2), grid, strict=True):
    own[0].imshow(test_x[chosen[row]], cmap="gray")
    own[0].set(title="as it is" if row == 0 else "", xticks=[], yticks=[])
    for axes, (name, found) in zip(own[1:], maps.items(), strict=True):
        axes.imshow(test_x[chosen[row]], cmap="gray")
        axes.imshow(over_image(found[row].mean(0), 8, 8), cmap="inferno", alpha=0.6)
        axes.set(title=f"layer {name.split('.')[2]}" if row == 0 else "", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## A Swin's patch sees its window
#
# The patch in row 3, column 3 of the 8 × 8 grid, in a layer and in the next one, whose windows have
# shifted by two: outside the window there is nothing.

# %%
names = list(image_maps(models["swin"], images))[:2]
figure, both = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
for axes, name in zip(both, names, strict=True):
    found = image_maps(models["swin"], images, query=(3, 3), where=name)[name]
    axes.imshow(found[0].mean(0), cmap="Blues")
    axes.plot(3, 3, "o", color="#d55e00")
    axes.set(title=f"layer {name.split('.')[4]}", xticks=[], yticks=[])
    print(f"layer {name.split('.')[4]}: {int((found[0].mean(0) > 0).sum())} of 64 patches are seen")
plt.show()

# %% [markdown]
# ## Is that where the answer comes from?
#
# A map of weights says what was read, not what counted. Rollout multiplies the layers; *occlusion* covers
# one patch and asks what the answer loses, and is the only one of the three that tests anything.

# %%
with ph.capture(models["vit"]) as seen, torch.no_grad():
    models["vit"](images)
reached = rollout(seen)[:, 0, 1:].view(-1, 4, 4)
lost = occlusion(models["vit"], images, logit(), patch=2, by=float(images.min()))
figure, grid = plt.subplots(2, 3, figsize=(6.4, 4.4), layout="constrained")
for row, own in zip(range(2), grid, strict=True):
    last = list(maps.values())[-1][row].mean(0)
    for axes, values, title in zip(
        own,
        (last, reached[row], lost[row].clamp_min(0)),
        ("last layer", "rollout", "occlusion"),
        strict=True,
    ):
        axes.imshow(test_x[chosen[row]], cmap="gray")
        axes.imshow(
            over_image(values.view(1, *values.shape[-2:]), 8, 8)[0], cmap="inferno", alpha=0.6
        )
        axes.set(title=title if row == 0 else "", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## To walk through
#
# Point at a patch: what it looks at lights up. Choose heads on the left.

# %%
ph.inside(
    models["vit"], image=test_x[chosen[1]], processor=processor, title="a ViT that reads an eight"
)
