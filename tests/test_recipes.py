"""The recipes run as they stand on their page, and give what their originators' formulas give on transformers' own model."""

from __future__ import annotations

import ast
import copy

import numpy as np
import pytest
import torch
from attention_of import AttentionOf, induction_pattern, kept_by_h2o, kept_by_snapkv, loss_of
from oracle import stock_of
from pages import blocks, code_in, rows, run, sections, value
from transformers.initialization import no_init_weights

from llama_attn import LlamaForCausalLM
from llama_attn.cli import app

pytestmark = pytest.mark.smollm2

LAYERS, GROUPS = 8, 3
# What is measured in float64; and in float32, where the bound of docs/error_budget.md holds.
BOUND, BUDGET = 1e-9, 1e-5
TEXTS = (
    "Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse, and nothing "
    "particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is "
    "a way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about the "
    "mouth; whenever it is a damp, drizzly November in my soul",
    "The old oak in the park is 42 metres high and was planted in 1712 by the mayor of the town, who liked trees better "
    "than people. The stone tower by the harbour was built in 1889, of the same stone as the church and the old bridge, and "
    "has been closed since the storm of last winter took a part of its roof away and threw it in the sea.",
)
DOCUMENTS = {
    "oak": "The old oak in the park was planted in 1712 by the mayor. ",
    "tower": "The stone tower by the harbour was built in 1889 by Stephen Sauvestre. ",
    "cue": "Question: Who built the tower? Answer: It was built by",
}
INDUCTION = "Induction heads, as TransformerLens counts them"
# Where a part of the model shows nothing.
WHOLE = ("Retrieval heads", "Lookback ratio", "Which document the answer came from", "A model without a head")
RECIPES = sections("recipes.md")


class Recipes:
    """Both pages, run: what each section of the recipes leaves behind, and what transformers' own models do.

    Measured is a part of SmolLM2 in float64; it generates and goes without a head as a whole, in float32.
    """

    def __init__(self, full, tokenizer):
        full.set_attn_implementation("sdpa")
        config = copy.deepcopy(full.config)
        config.num_hidden_layers = LAYERS
        with no_init_weights():
            self.full, self.short = full, LlamaForCausalLM(config).double().eval()
        self.short.load_state_dict(full.state_dict(), strict=False)
        self.stock, self.stock_full = stock_of(self.short), stock_of(full)
        pieces = {name: tokenizer(text)["input_ids"] for name, text in DOCUMENTS.items()}
        self.labels = [name for name, ids in pieces.items() for _ in ids]
        prompt = torch.tensor([[number for ids in pieces.values() for number in ids]])
        fact = tokenizer(" Stephen Sauvestre")["input_ids"]
        first = next(at for at in range(prompt.shape[1]) if prompt[0, at : at + len(fact)].tolist() == fact)
        self.needle = (first, first + len(fact))
        self.known = {
            "tokenizer": tokenizer, "texts": list(TEXTS), "inputs": tokenizer(TEXTS[0], return_tensors="pt"),
            "prompt": {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)},
            "labels": self.labels, "needle": self.needle,
        }  # fmt: skip
        torch.manual_seed(0)
        self.left = {title: self.run(title, full if title in WHOLE else self.short) for title in RECIPES}
        self.ids, self.prompt = self.known["inputs"]["input_ids"], prompt
        self.text = AttentionOf(self.stock, self.ids)
        with torch.no_grad():
            self.sequence = self.stock_full.generate(prompt, max_new_tokens=8, do_sample=False)
        self.answered = AttentionOf(self.stock_full, self.sequence[:, :-1])
        self.answering = range(prompt.shape[1] - 1, self.sequence.shape[1] - 1)

    def run(self, title, model):
        """What a section leaves behind."""
        self.known["model"] = model
        for block in blocks(RECIPES[title]):
            run(block, self.known)
        return dict(self.known)

    def cut(self, length):
        """Token ids of all texts, cut."""
        return torch.tensor([self.known["tokenizer"](text)["input_ids"][:length] for text in TEXTS])


@pytest.fixture(scope="module")
def recipes(_smollm2):
    return Recipes(*_smollm2)


def close(found, expected, bound=BOUND):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=bound, atol=bound)


def test_each_recipe_is_two_lines_behind_a_run():
    titles = [title for title in RECIPES if title]
    assert len(titles) == 13
    for title in titles:
        assert blocks(RECIPES[title]), title
        assert "Source: " in RECIPES[title], title
        assert len(RECIPES[title].strip().splitlines()) <= 30, f"{title}: more than a screen"
        for block in blocks(RECIPES[title]):
            assert lines_behind_the_run(block) <= 2, title
    assert lines_behind_the_run("stats = measure(inputs)\na = 1\nb = 2\nc = 3") == 3, "the check can fail"


def lines_behind_the_run(block):
    runs = [
        statement.end_lineno
        for statement in ast.parse(block).body
        if isinstance(statement, ast.Assign) and statement.targets[0].id in ("stats", "ds")
    ]
    return len(block.splitlines()) - max(runs, default=0)


def test_sink_rate(recipes):
    weights = AttentionOf(recipes.stock, recipes.cut(64)).weights
    importance = (weights / torch.arange(64, 0, -1)).sum(-2)
    is_sink = (importance > 0.3).double()
    found = recipes.left["Sink rate of my texts"]
    close(found["rate"], is_sink.mean((0, 1, 2))[0])
    close(found["per_layer"], is_sink.mean((1, 2))[:, 0])
    assert 0 < float(found["rate"]) < 1


@pytest.mark.parametrize("whole", [False, True])
def test_induction_as_transformer_lens_counts_it(whole, recipes):
    model, stock = (recipes.full, recipes.stock_full) if whole else (recipes.short, recipes.stock)
    known = recipes.run(INDUCTION, model)
    ids = torch.cat([known["half"], known["half"]], -1)
    weights, pattern = AttentionOf(stock, ids).weights[:, 0], induction_pattern(ids[0].tolist())
    stripe, bound = weights.diagonal(dim1=-2, dim2=-1, offset=1 - 50), BUDGET if whole else BOUND
    close(known["detector"], (weights * pattern).sum((-2, -1)) / weights.sum((-2, -1)), bound)
    close(known["stripe"], stripe.mean(-1), bound)
    if whole:
        assert float(known["stripe"].max()) > 0.3, "some head looks for copies"
        assert float((stripe[..., 1:].mean(-1) - stripe.mean(-1)).abs().max()) > 100 * bound, "the first pair counts"
    else:
        weights[..., 0] = 0
        without_bos = next(code for code in code_in(RECIPES[INDUCTION]) if "1 - ds.sink_mass" in code)
        expected = (weights * pattern).sum((-2, -1)) / weights.sum((-2, -1))
        close(value(without_bos, known).isel(batch=0), expected, bound)


def test_largest_activations_and_the_median(recipes):
    found = recipes.left["Largest three activations and the median of a layer"]
    assert len(recipes.text.outputs) == LAYERS
    for layer, state in enumerate(recipes.text.outputs):
        magnitudes = state.abs().flatten().sort(descending=True).values
        close(found["top"][layer + 1, 0], magnitudes[:3])
        median, lower = float(found["median"][layer + 1, 0]), float(state.abs().median())
        close(median, np.median(magnitudes))
        assert not ((magnitudes > lower) & (magnitudes < median)).any(), "no number between theirs and ours"
    assert float(found["top"].max()) > 100, "of which the massive ones are"


def test_figure_2_of_streaming_llm(recipes):
    mean = AttentionOf(recipes.stock, recipes.cut(16)).scores.mean(1)
    found = recipes.left["Fig. 2 of StreamingLLM"]["logits"]
    close(found, mean.masked_fill(mean.isinf(), torch.nan))


def test_norm_weighted_attention(recipes):
    found = recipes.left["Norm-weighted attention"]
    for layer, head in ((0, 8), (3, 5), (7, 1)):
        weights, transformed = recipes.text.weights[layer, 0, head], recipes.text.transformed(layer, head)
        vectors = weights[:, :, None] * transformed
        close(found["pairs"][layer, 0, head], vectors.norm(dim=-1))
        close(found["received"][layer, 0, head], vectors.norm(dim=-1).sum(0))


def test_observed_attention(recipes):
    weights = recipes.text.weights
    length = weights.shape[-1]
    scores = weights.sum(-2) / torch.arange(length, 0, -1)
    scores = scores.view(LAYERS, 1, GROUPS, -1, length).mean(3)
    close(recipes.left["Observed attention of kvpress"]["scores"], scores)


def test_kept_sets(recipes):
    found, weights = recipes.left["Kept sets of SnapKV and H2O"], recipes.text.weights[:, 0]
    for name, kept in (("snapkv", kept_by_snapkv(weights, 80, GROUPS)), ("h2o", kept_by_h2o(weights, 32, GROUPS))):
        np.testing.assert_array_equal(found[name][:, 0], kept)
        assert len(kept.flatten(0, 1).unique(dim=0)) > LAYERS, "heads keep different keys"


def test_retrieval_heads(recipes):
    title = "Retrieval heads"
    found, (first, stop) = recipes.left[title], recipes.needle
    weights, tokens = recipes.answered.weights[:, 0], recipes.sequence[0]
    copied, in_steps = torch.zeros(*weights.shape[:2], stop - first), torch.zeros(weights.shape[:2])
    for i in recipes.answering[:-1]:
        most = weights[:, :, i].argmax(-1)
        hits = (first <= most) & (most < stop) & (tokens[most] == tokens[i + 1])
        in_steps += hits / (stop - first)
        for layer, head in hits.nonzero():
            copied[layer, head, most[layer, head] - first] = 1
    close(found["found"].score[:, 0], copied.mean(-1))
    close(found["found"].retrieval[:, 0], copied.mean(-1) > 0.1)
    close(value(next(code for code in code_in(RECIPES[title]) if "steps" in code), found)[:, 0], in_steps)
    assert float(found["found"].score.max()) > 0.5, "some head copies most of the needle"


def test_lookback_ratio(recipes):
    found = recipes.left["Lookback ratio"]
    prompt = recipes.prompt.shape[1]
    for name, context in (("ratio", prompt), ("as_in_code", prompt - recipes.labels.count("cue"))):
        for step, i in enumerate(recipes.answering):
            row = recipes.answered.weights[:, 0, :, i, : i + 1]
            on_context, on_new = row[..., :context].mean(-1), row[..., context:].mean(-1)
            expected = on_context / (on_context + on_new)
            close(found[name][:, 0, :, step], expected, BUDGET)
    assert np.isnan(found["ratio"][..., 0]).all()
    assert np.isfinite(found["as_in_code"]).all()


def test_sources(recipes):
    found = recipes.left["Which document the answer came from"]
    names, expected = [*DOCUMENTS, "generated"], []
    of_key = np.array([*recipes.labels, *["generated"] * len(recipes.answering)])[: recipes.answering.stop]
    for i in recipes.answering:
        row = recipes.answered.weights[:, 0, :, i].mean((0, 1)).numpy().copy()
        sink, row[0] = row[0], 0
        expected.append([row[of_key == name].sum() / (1 - sink) for name in names])
        here = found["table"][found["table"].position == i + 1].set_index("segment")
        close(here.without_sink[names], expected[-1], BUDGET)
    close(found["whole"][names], np.mean(expected, 0), BUDGET)
    winner = found["table"][(found["table"].position == -1) & found["table"].wins].segment.tolist()
    assert winner == [max(DOCUMENTS, key=lambda name: np.mean(expected, 0)[names.index(name)])]


def test_the_last_row(recipes):
    close(recipes.left["Weights of the last token"]["last"], recipes.text.weights[..., -1, :])


def test_a_smaller_cache(recipes):
    found = recipes.left["What a smaller cache would cost"]
    weights = recipes.text.weights[:, 0]
    kept = kept_by_h2o(weights[..., :80, :80], 32, GROUPS)
    length = weights.shape[-1]
    np.testing.assert_array_equal(found["keep"][:, 0, :, :80], kept)
    all_kept = torch.cat([kept, torch.ones(LAYERS, GROUPS, length - 80, dtype=torch.bool)], -1)
    all_kept = all_kept.repeat_interleave(3, 1)[:, :, None]
    close(found["kept"][:, 0], (weights * all_kept).sum(-1)[..., 80:])
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen = seen & (all_kept | (torch.arange(length) < 80)[:, None])
    close(float(found["loss"]), loss_of(recipes.stock, recipes.ids, seen), BUDGET)
    assert float(found["loss"]) != pytest.approx(loss_of(recipes.stock, recipes.ids), abs=1e-3)


def test_without_a_head(recipes):
    weight = recipes.stock_full.model.layers[18].self_attn.o_proj.weight
    plain, before = loss_of(recipes.stock_full, recipes.ids), weight.data.clone()
    weight.data[:, 6 * 64 : 7 * 64] = 0
    expected = loss_of(recipes.stock_full, recipes.ids)
    weight.data = before
    assert float(recipes.left["A model without a head"]["loss"]) == pytest.approx(expected, rel=BUDGET)
    assert abs(expected - plain) > 10 * BUDGET * plain


@pytest.fixture(scope="module")
def both(recipes):
    """What the left and the right side of the other page know."""
    stock, ids, last = recipes.stock, recipes.ids, LAYERS - 1
    stock.set_attn_implementation("eager")
    given = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        outputs = stock(ids, **given)
        settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
        steps = stock.generate(ids, attention_mask=torch.ones_like(ids), **settings, **given)
    stock.set_attn_implementation("sdpa")
    cache = {("resid_post", last): recipes.text.last}
    for layer, call in enumerate(recipes.text.calls):
        cache |= {
            ("pattern", layer): recipes.text.weights[layer],
            ("attn_scores", layer): recipes.text.scores[layer],
            ("resid_pre", layer): call.hidden,
            ("rot_k", layer): call.key.transpose(1, 2),
            ("v", layer): call.value.transpose(1, 2),
        }
    known = recipes.known | {"outputs": outputs, "steps": steps, "cache": cache}
    known |= {"layer": 3, "head": 5, "step": 2, "last": last}
    # `measure` and `answer` look up the model where they were made.
    recipes.known["model"] = known["model"] = recipes.short
    for block in blocks(sections("coming_from.md")[""]):
        run(block, known)
    return known


COMPARED = {"`output_attentions`": 9, "TransformerLens": 6}


@pytest.mark.parametrize("title", ["`output_attentions`", "TransformerLens", "BertViz", "`head_mask`"])
def test_here_is_what_was_there(title, both, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compared = 0
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    with torch.no_grad():
        for _, there, here in rows(sections("coming_from.md")[title]):
            (code,) = code_in(here)
            if code.startswith("llama-attn "):
                assert code.split()[1] in commands
                continue
            if code.startswith("with "):
                run(code, both)
                continue
            found, old = value(code, both), code_in(there)[0]
            if old.startswith(("outputs.", "steps.", "cache[", "torch.")):
                expected = value(old, both)
                # Keys that did not exist yet have no weight.
                unseen = found.shape[-1] - expected.shape[-1]
                expected = torch.nn.functional.pad(expected, (0, unseen if "generated" in code else 0))
                close(found, expected, BUDGET)
                compared += 1
    assert compared == COMPARED.get(title, 0)


def test_the_last_hidden_layer_is_before_the_final_norm(both, recipes):
    norms, theirs = both["stats"]["hidden_norm"], both["outputs"].hidden_states
    for layer in range(LAYERS):
        close(norms[layer], theirs[layer].norm(dim=-1), BUDGET)
    final = recipes.stock.model.norm
    close(norms[-1], recipes.text.last.norm(dim=-1))
    close(final(recipes.text.last).detach(), theirs[-1], BUDGET)
    assert not torch.allclose(norms[-1], theirs[-1].norm(dim=-1), rtol=0.1)


def test_what_the_addition_within_the_logarithm_takes_off(both, recipes):
    weights = recipes.text.weights
    less = both["stats"]["entropy"] + (weights * (weights + 1e-6).log()).sum(-1)
    visible = torch.arange(1, weights.shape[-1] + 1)
    assert (less > -BOUND).all()
    assert (less < 1e-6 * visible + BOUND).all()
    assert float((less / visible).max()) > 0.9e-6, "it comes near to that"
