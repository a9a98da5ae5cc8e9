"""Every sentence and headline number of the findings, worked out again from weights in float64, on real texts."""

from __future__ import annotations

import difflib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from oracle import capture, stock_of
from sentences import Truth, says

from llama_attn import AttentionStatsConfig
from llama_attn.analysis import compare
from llama_attn.viz.report.findings import findings

PROSE = (Path(__file__).parents[1] / "LICENSE").read_text()
CODE = inspect.getsource(difflib)
EVERY = tuple(range(30))


@pytest.fixture(scope="module")
def stock(_smollm2):
    return stock_of(_smollm2[0])


def case_of(name, model, tokenizer, chat):
    """Inputs, the row that is looked at, the configuration, and what to call: forward or generate."""
    prose, code = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (PROSE, CODE[5000:9000]))
    real = torch.ones(2, 60, dtype=torch.long)
    real[0, :15] = 0
    distance = torch.arange(110)[:, None] - torch.arange(110)
    segments = torch.tensor([[0] * 17 + [1] * 12 + [-1] * 5])
    return {
        "short": (chat, 0, {"segments": segments}),
        "long": ({"input_ids": prose[:, :700]}, 0, {"layers": (13, 5, 3, 2)}),
        "code": ({"input_ids": code[:, :260]}, 0, {"layers": (4, 12), "heads": (0, 4, 8), "query_stride": 3}),
        "padded": ({"input_ids": prose[:, :120].view(2, 60), "attention_mask": real}, 0, {"layers": (3, 6, 13)}),
        "generated": (chat, 0, {"layers": (3, 12, 29)}),
        "windowed": (
            {"input_ids": prose[:, 700:810], "attention_mask": ((distance >= 0) & (distance < 48))[None, None]},
            0, {"layers": (1, 4, 7)},
        ),
    }[name]  # fmt: skip


@pytest.fixture(params=["short", "long", "code", "padded", "generated", "windowed"])
def run(request, smollm2, demo_chat, stock):
    """The findings of one row, and the truth."""
    name, (model, tokenizer) = request.param, smollm2
    inputs, row, settings = case_of(name, model, tokenizer, dict(demo_chat))
    config = AttentionStatsConfig(statistics="all", norms=True, **settings)
    asked = {"output_attention_stats": config}
    with torch.no_grad():
        if name == "generated":
            outputs = model.generate(
                **inputs, **asked, max_new_tokens=40, do_sample=False, return_dict_in_generate=True
            )
            inputs = {"input_ids": outputs.sequences[:, :-1]}
        else:
            outputs = model(**inputs, **asked)
    found = findings(outputs.attention_stats.to_xarray().isel(batch=[row]))
    return name, found, truth_of(stock, inputs, row, config)


def truth_of(stock, inputs, row, config):
    layers, last = capture(stock, **inputs)
    length = inputs["input_ids"].shape[1]
    mask = inputs.get("attention_mask", torch.ones(1, length))
    visible = mask[row, 0].numpy() if mask.ndim == 4 else np.tril(np.ones((length, length), bool))
    if mask.ndim == 2:
        visible = visible & (mask[row] > 0).numpy() & (mask[row] > 0).numpy()[:, None]
    chosen = sorted(config.layers or EVERY)
    heads = config.heads or range(9)
    rows = np.arange(0, length, config.query_stride)
    weights = []
    for at in chosen:
        query, key = (part[row].double() for part in (layers[at].query, layers[at].key.repeat_interleave(3, 1)))
        scores = torch.einsum("hqd,hkd->hqk", query[list(heads)], key[list(heads)]) * layers[at].scaling
        kept = torch.from_numpy(visible)
        weights.append(scores.masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num(0)[:, rows].numpy())
    states = [layers[at].hidden for at in chosen] + [last]
    states = [state[row, rows].double().abs().numpy() for state in states]
    ids = inputs["input_ids"][row].tolist()
    return Truth(np.stack(weights), visible[rows], rows, ids, chosen, list(heads), states)


PARTS = {
    "short": "", "long": "layers 2–3, 5, 13 of 30", "code": "layers 4, 12 of 30, heads 0, 4, 8 of 9, every 3rd query",
    "padded": "layers 3, 6, 13 of 30", "generated": "layers 3, 12, 29 of 30", "windowed": "layers 1, 4, 7 of 30",
}  # fmt: skip


def test_findings(run):
    name, found, truth = run
    checks = [sinks, locality, layers, heads, activations] + ([segments] if name == "short" else [])
    part = PARTS[name]
    for finding, check in zip(found, checks, strict=True):
        text = "".join(word if isinstance(word, str) else f"<{word['token']}>" for word in finding.words)
        if part:
            text = says(text, f"Measured: {part}. ")
            assert finding.caption.endswith(f"; measured: {part}")
        assert check(truth, finding, text, name) == "", "a sentence that was not checked"


def sinks(truth, finding, text, name):
    rates = truth.alpha[..., truth.first] > 0.3
    heads = len(truth.layers) * len(truth.heads)
    assert says(finding.figure, "{}", rates.mean()) == ""
    tokens = len(np.flatnonzero(truth.seen))
    says(finding.caption, f"of heads have a sink at the first token (ε = 0.3, T = {tokens})")
    text = says(text, f"The first token, <{truth.first}>, is a sink of {{}} of the {heads} heads: it receives more than "
                "0.3 of the attention of the queries that see it. ", rates.mean())  # fmt: skip
    text = says(text, "On average it takes {} of all attention, {} times what uniform attention would give it. ",
                truth.share[..., truth.first].mean(), truth.boost[..., truth.first].mean())  # fmt: skip
    by_layer = rates.mean(1)
    if rates.any():
        ties = np.isclose(by_layer, by_layer.max()).sum() - 1
        more = f" and {ties} more" if ties else ""
        text = says(
            text, f"The rate is highest in layer {truth.layers[by_layer.argmax()]}{more} ({{}})", by_layer.max()
        )
        over = [layer for layer, rate in zip(truth.layers, by_layer, strict=True) if rate > 0.5]
        text = says(text, f" and first exceeds one half in layer {over[0]}. " if over else ". ")
    shares = truth.share.mean((0, 1))
    others = [key for key in np.argsort(-shares) if truth.named[key] and key != truth.first]
    if name in ("long", "code"):
        assert others, "there is something to name"
    assert max([*others, 0]) < truth.positions[-1] - 5, "never one of the last tokens"
    text = says(text, "Other sinks, by the share of all attention: " if others else "No other token is named. ")
    for number, key in enumerate(others[:3]):
        peak = truth.share[:, :, key].mean(1).argmax()
        text = says(text, f"{'; ' if number else ''}<{key}> at {key} with {{}} (most in layer {truth.layers[peak]}: {{}}, "
                    f"{{}} times uniform attention; seen by {truth.seen[key]} queries)", shares[key],
                    truth.share[peak, :, key].mean(), truth.boost[peak, :, key].mean())  # fmt: skip
    if others:
        text = says(text, f"; and {len(others) - 3} more. " if len(others) > 3 else ". ")
    if (top := shares.argmax()) != truth.first:
        text = says(text, f"Yet the token that takes most is <{top}> at {top}: {{}}. ", shares[top])
    return says(text, "Tokens are named if the heads of some layer give them, on average, more of all attention than "
                f"chance explains, and at least {truth.needed} queries see them.")  # fmt: skip


def locality(truth, finding, text, name):
    every = slice(None)
    far = truth.mean((truth.weights * truth.distance).sum(-1), every)
    uniform_far = (truth.uniform * truth.distance).sum(-1).mean()
    local = far / uniform_far < 0.5
    assert says(finding.figure, "{}", local.mean()) == ""
    text = says(text, f"{local.sum()} of {local.size} heads are local: the keys they attend to lie less than 0.5 × as far "
                "away as under uniform attention. ")  # fmt: skip
    near = truth.distance < 64
    text = says(
        text, "The mean distance is {} tokens, and would be {} if attention were uniform. ", far.mean(), uniform_far
    )
    if name in ("short", "padded", "windowed"):
        text = says(text, "All that a token sees lies within the nearest 64 tokens. ")
    else:
        text = says(text, "The nearest 64 tokens hold {} of the attention, against {}. ",
                    (truth.weights * near).sum(-1).mean(), (truth.uniform * near).sum(-1).mean())  # fmt: skip
    if name == "windowed":
        text = says(text, "In every layer a query sees at most 48 tokens. ")
    share = local.mean(1)
    if share.max() > share.min():
        most = truth.layers[share.argmax()]
        text = says(text, f"Local heads are most frequent in layer {most} ({{}} of its heads). ", share.max())
    flat = truth.entropy()[..., truth.several] / np.log(truth.count[truth.several])
    return says(text, "Entropy is {} of what uniform attention has.", flat.mean())


def layers(truth, finding, text, name):
    numbers = {
        "Mean entropy goes from {} to {} nat": truth.entropy().mean((1, 2)),
        "Mean distance to the attended keys goes from {} to {} tokens": (truth.weights * truth.distance).sum(-1).mean((1, 2)),
        "Attention of all queries on the first token goes from {} to {}": truth.weights[..., truth.first].mean((1, 2)),
        "The norm of the residual stream goes from {} to {}": np.array(
            [np.sqrt((state**2).sum(-1)).mean() for state in truth.states]
        ),
    }  # fmt: skip
    entropy = numbers["Mean entropy goes from {} to {} nat"]
    assert says(finding.figure, "{} → {}", entropy[0], entropy[-1]) == ""
    says(finding.caption, f"nat: mean entropy of layer {truth.layers[0]} and of layer {truth.layers[-1]}")
    names = [f"in layer {layer}" for layer in truth.layers] + ["in the output"]
    for sentence, means in numbers.items():
        low, high = means.argmin(), means.argmax()
        text = says(text, f"{sentence}; lowest {names[low]} ({{}}), highest {names[high]} ({{}}). ",
                    means[0], means[-1], means[low], means[high])  # fmt: skip
    return text


def heads(truth, finding, text, name):
    roles, scores = truth.roles(), truth.scores()
    counts = {role.replace("_", " "): roles.count(role) for role in set(roles)}
    listed = re.match(rf"Of {len(roles)} heads: (.*?)\. ", text)
    shown = {role: int(number) for number, role in re.findall(r"(\d+) ([a-z ]+)", listed[1])}
    assert shown == counts
    assert list(shown.values()) == sorted(shown.values(), reverse=True)
    top = re.match("of heads are “(.*)”, the most frequent role", finding.caption)[1]
    assert counts[top] == max(counts.values())
    assert says(finding.figure, "{}", counts[top] / len(roles)) == ""
    text = text[listed.end() :]
    for role in ("previous_token", "induction", "duplicate_token"):
        text = says(text, f"Highest {role.replace('_', '-')} scores (layer.head): ")
        best = sorted(scores[role].ravel(), reverse=True)[:3]
        for number, value in enumerate(best):
            layer, head = re.match(r"(?:, )?(\d+)\.(\d+)", text).groups()
            at = truth.layers.index(int(layer)), truth.heads.index(int(head))
            assert abs(scores[role][at] - value) < 1e-5
            text = says(text, f"{', ' if number else ''}{layer}.{head} ({{}})", value)
        text = says(text, ". ")
    return says(text, "In ordinary text few tokens have an earlier copy, so heads that look for copies often rest on the "
                "sink; a random sequence repeated twice shows them better.")  # fmt: skip


def activations(truth, finding, text, name):
    of_token = [np.median(state, -1) for state in truth.states]
    medians = [np.median(each) if name == "generated" else np.median(state)
               for each, state in zip(of_token, truth.states, strict=True)]  # fmt: skip
    largest = np.array([state.max(-1) for state in truth.states])
    at, query = np.unravel_index(largest.argmax(), largest.shape)
    peak, position = largest[at, query], truth.positions[query]
    said = [f"enters layer {layer}" for layer in truth.layers] + ["leaves the last layer"]
    where = f"<{position}> at {position}, channel {truth.states[at][query].argmax()}, in what {said[at]}."
    assert says(finding.figure, "{}", peak) == ""
    median = "the median of the tokens' medians" if name == "generated" else "the median"
    left = says(finding.caption, f"largest magnitude in the residual stream, {{}} × {median}", peak / medians[at])
    assert left == "" or left.startswith("; measured")
    massive = truth.massive(medians)
    tokens = [i for i in np.argsort(-largest.max(0)) if any(each[i].any() for each in massive)]
    bound = f"(above 100 and at least 1,000 × {median})"
    if not tokens:
        return says(text, f"No activation is massive {bound}. The largest is {{}}, on {where}", peak)
    start = "One token has" if len(tokens) == 1 else f"{len(tokens)} tokens have"
    text = says(text, f"{start} massive activations {bound}. ")
    for i in tokens[:3]:
        inside = [number for number, each in enumerate(massive) if each[i].any()]
        channels = np.concatenate([np.flatnonzero(each[i]) for each in massive])
        numbers, counts = np.unique(channels, return_counts=True)
        named = []
        for channel in numbers[np.argsort(-counts, kind="stable")][:3]:
            there = [said[number] for number, each in enumerate(massive) if each[i, channel]]
            span = f"in what {there[0]}" if len(there) == 1 else f"from what {there[0]} to what {there[-1]}"
            named.append(f"channel {channel} {span}")
        place = truth.positions[i]
        text = says(text, f"<{place}> at {place}: {', '.join(named)}")
        inner = [number for number in inside if number < len(truth.layers)]
        if inner and truth.seen[place] >= truth.needed:
            text = says(text, "; {} of the heads of these layers have their sink here",
                        (truth.alpha[inner][..., place] > 0.3).mean())  # fmt: skip
        text = says(text, ". ")
    return says(text, f"The largest, {{}}, is on {where}", peak)


def segments(truth, finding, text, name):
    spans = [slice(0, 17), slice(17, 29)]
    mass = np.stack([truth.weights[..., span].sum(-1) for span in spans], -1)
    shares, last = mass.mean((0, 1, 2)), mass[:, :, -1].mean((0, 1))
    order = shares.argsort()[::-1]
    # Not the part that gets most: the one that gets most beyond uniform attention.
    even = np.stack([truth.uniform[:, span].sum(-1) for span in spans], -1).mean(0)
    most = (shares - even).argmax()
    assert says(finding.figure, "{}", shares[most]) == ""
    caption = f"of all attention goes to “{most}”, uniform attention: {{}}"
    assert says(finding.caption, caption, even[most]) == ""
    listed = ", ".join(f"“{at}” {{}}" for at in order)
    text = says(text, f"Of all attention: {listed}; tokens of no part, {{}}. Early tokens see the first parts only. ",
                *shares[order], 1 - shares.sum())  # fmt: skip
    end = truth.positions[-1]
    text = says(text, f"Of the attention of the last measured token, <{end}>: {listed}. ", *last[order])
    for at in order:
        by_layer = mass[..., at].mean((1, 2))
        text = says(text, f"“{at}” gets most in layer {truth.layers[by_layer.argmax()]} ({{}}). ", by_layer.max())
    return says(text, f"Uniform attention would give {listed}.", *even[order])


def test_the_reading_can_fail():
    assert says("takes 17% of 451.", "takes {} of {}", 0.174, 451.2) == "."
    for values in ((0.176, 451), (0.17, 452)):
        with pytest.raises(AssertionError):
            says("takes 17% of 451.", "takes {} of {}", *values)


def test_numbers_of_compare(smollm2, stock):
    """A text, and the same behind ten more tokens: what is aligned, and its differences."""
    model, tokenizer = smollm2
    ids = tokenizer(PROSE, return_tensors="pt")["input_ids"]
    texts = [ids[:, 700:820], torch.cat([ids[:, 500:510], ids[:, 700:790]], 1)]
    config = AttentionStatsConfig(layers=(2, 5, 13))
    with torch.no_grad():
        runs = [
            model(text, output_attention_stats=config).attention_stats.with_tokens(tokenizer, text) for text in texts
        ]
    frame = compare(*runs)
    assert frame.attrs["summary"] == "90 of 120 tokens aligned (b has 100), 90 of them at another position"
    check_lines(
        frame, [truth_of(stock, {"input_ids": text}, 0, config) for text in texts], np.arange(90), np.arange(10, 100)
    )


def check_lines(frame, truths, at_a, at_b):
    entropies = [truth.entropy() for truth in truths]
    scale = np.std(np.concatenate([entropies[0][..., at_a], entropies[1][..., at_b]]))

    def usual(layer, head, position):
        near = [
            entropy[layer, head, [i for i in range(entropy.shape[2])
                                  if (position + 1) / 2**0.5 <= i + 1 <= (position + 1) * 2**0.5]]
            for entropy in entropies
        ]  # fmt: skip
        return np.concatenate(near).mean()

    for layer, head in np.ndindex(3, 9):
        line = frame[
            (frame.statistic == "entropy") & (frame.layer == truths[0].layers[layer]) & (frame["head"] == head)
        ]
        a, b = entropies[0][layer, head, at_a], entropies[1][layer, head, at_b]
        moves = [usual(layer, head, j) - usual(layer, head, i) for i, j in zip(at_a, at_b, strict=True)]
        matched = b - a - moves
        expected = [a.mean(), b.mean(), (b - a).mean(), matched.mean(), np.sqrt((matched**2).mean()) / scale]
        found = line[["mean_a", "mean_b", "difference", "matched", "effect"]].to_numpy(float)[0]
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)
        assert abs(line.largest.item() - (b - a)[np.abs(b - a).argmax()]) < 1e-4


@pytest.mark.parametrize(("width", "said"), [(8, True), (37, False)])
def test_few_queries_see_the_first_token_behind_a_window(width, said, ids):
    """Even uniform attention gives it a large share of what these few give."""
    apart = torch.arange(37)[:, None] - torch.arange(37)
    mask = ((apart >= 0) & (apart < width)).expand(1, 1, -1, -1)
    with torch.no_grad():
        stats = tiny_model()(
            ids[:1], attention_mask=mask, output_attention_stats=AttentionStatsConfig(statistics="all", norms=True)
        ).attention_stats
    text = "".join(str(word) for word in findings(stats.to_xarray())[0].words)
    assert (f"As few as {width} queries see it, where " in text) == said
