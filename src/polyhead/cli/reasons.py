"""Why a part was changed: a line for each part, as a student would note it.

For each fact of `anatomy` the reasons by what the new value holds; "" stands for any value.
"""

from collections.abc import Mapping

REASONS: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("layers", "number"): {"": "depth: more steps of the same kind"},
    ("layers", "beside"): {
        "scale": "each part begins small, so that deep stacks train",
        "merge": "later stages see coarser pictures, as in a pyramid",
        "projector": "image vectors take the place of words",
        "convolution": "neighbours meet before attention",
    },
    ("embedding", "tokens"): {
        "widened": "a narrow table: most of a word's meaning is made by its context",
        "": "a row for each token: a larger vocabulary makes texts shorter",
    },
    ("embedding", "patches"): {"": "images are texts of patches, each a vector"},
    ("embedding", "scaled"): {"": "brings tokens to the size of the sinusoids added to them"},
    ("embedding", "token types"): {
        "none": "which of two texts a token is of can be read off the separators",
        "": "says which of two texts a token is of",
    },
    ("embedding", "norm"): {
        "none": "the first layer norms its own input",
        "": "brings the sum of the tables to one size",
    },
    ("position", "kind"): {
        "rotary": "turns queries and keys, so that scores see distances; no table, longer texts",
        "disentangled": "content and distance each have queries and keys of their own",
        "bias for each head and distance": "only distances matter, and only to the scores",
        "offset": "within a window, only the offset of two patches matters",
        "learned": "a vector for every place, up to a longest text",
        "sinusoids": "fixed waves: nothing to learn, no longest text",
        "ALiBi": "far keys weigh less, by a slope for each head",
        "none": "order shows only by the mask",
    },
    ("norm", "kind"): {
        "RMSNorm": "divides by the length alone: no mean, no bias, one pass less",
        "LayerNorm": "takes away the mean and divides by the spread",
    },
    ("norm", "where"): {
        "before": "the residual stream stays untouched: deep stacks train more easily",
        "after": "as in 2017: keeps the sizes of sums in check, but needs care in training",
    },
    ("norm", "final"): {
        "yes": "pre-norm leaves the sum un-normed at the end",
        "no": "post-norm has normed the last sum already",
    },
    ("norm", "eps"): {"": "guards the division; must be the checkpoint's"},
    ("norm", "bias"): {"no": "one vector less, and nothing lost", "": "a learned shift"},
    ("window", "tokens"): {"": "each place in the window has weights of its own"},
    ("recurrence", "kind"): {"LSTM": "what was read goes on as a state, which gates rewrite"},
    ("attention", "kind"): {
        "Disentangled": "scores add content-to-position and position-to-content",
        "": "scores are of contents alone",
    },
    ("attention", "sees"): {
        "windows": "the cost grows with the image, not with its square",
        "of ": "a window: memory and time stop growing with the text",
        "and the encoder": "writes one text while reading another",
        "before": "to write, a token may not see what comes after it",
        "all": "to understand, every token sees both sides",
    },
    ("attention", "heads"): {"": "so many patterns of looking in a layer"},
    ("attention", "kv heads"): {
        "each": "query heads share keys and values: a smaller cache",
        "as many": "every query head has keys and values of its own",
    },
    ("attention", "head width"): {"": "how fine a single look is"},
    ("attention", "scale"): {
        "1/": "keeps scores from growing with the width (and the number of terms)",
        "1": "left out: initialisation or training makes up for it",
    },
    ("attention", "biases"): {
        "none": "norms and other parts can take over; fewer weights to move",
        "": "a learned shift of queries, keys, values or output",
    },
    ("attention", "norm of q, k"): {"": "keeps scores from exploding in training"},
    ("feed-forward", "kind"): {
        "Mixture": "many feed-forwards of which a token visits few: more weights, same work",
        "Gated": "one half opens and closes the other: better for the same weights",
        "": "one wide layer between two products",
    },
    ("feed-forward", "width"): {"": "most of a layer's weights; gated ones take 2/3 of 4 E"},
    ("feed-forward", "activation"): {
        "relu": "cheap, and half of the values are exactly 0",
        "silu": "smooth, and with a gate SwiGLU",
        "gelu": "smooth near 0, where ReLU has a corner",
    },
    ("feed-forward", "gate"): {
        "yes": "the gate decides value by value what goes through",
        "no": "two products in the place of three",
    },
    ("feed-forward", "biases"): {"none": "fewer weights, nothing lost", "": "learned shifts"},
    ("feed-forward", "experts"): {"none": "every token takes the same way", "": "a router chooses"},
    ("sharing", "layers"): {
        "layers share": "the same layer again and again: far fewer weights, the same work",
        "none": "every layer has weights of its own",
    },
    ("sharing", "head and embedding"): {
        "one table": "what a token means and when to say it: one table, fewer weights",
        "apart": "large models can afford a table for each",
    },
    ("head", "here"): {"": "what turns hidden states into answers"},
    ("training", "objective"): {
        "replaced": "every token teaches, not the 15 % that are masked",
        "sentence order": "harder than telling two documents apart",
        "each epoch": "a text is never masked twice alike; no next-sentence task",
        "own answers": "a small model learns from a large one's doubts",
        "span": "reads a broken text and writes what is missing",
        "causal": "every token is a target, and the model can write",
        "masked": "to guess a word from both sides",
        "captions": "labels come free with images from the web",
    },
    ("training", "tokenizer"): {
        "byte": "no unknown token: every byte is in the vocabulary",
        "WordPiece": "whole words where frequent, pieces marked ## where not",
        "unigram": "pieces by likelihood, spaces kept as ▁",
        "none": "pixels need no vocabulary",
    },
}


def reason(part: str, name: str, before: str | None, after: str | None) -> str:
    """Why the second is as it is; "" where nothing is said. What is new in it is said first."""
    said = REASONS.get((part, name), {})
    if after is None:
        return ""
    fitting = [key for key in said if key in after]
    new = [key for key in fitting if key and key not in (before or "")]
    return said[(new or fitting)[0]] if fitting else ""
