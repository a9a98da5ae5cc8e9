"""Checks of ``generate`` in place of upstream's ``tests/generation/test_utils.py``, which no distribution ships."""

import copy
import inspect
import tempfile

import torch
from parameterized import parameterized
from transformers import DynamicCache, StaticCache, set_seed

MODES = [
    ("greedy", {}),
    ("sample", {"do_sample": True}),
    ("beam", {"num_beams": 2}),
    ("beam_sample", {"num_beams": 2, "do_sample": True}),
    ("returned_beams", {"num_beams": 3, "num_return_sequences": 3}),
    ("penalties", {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 2}),
    ("filtered", {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7}),
    ("prompt_lookup", {"prompt_lookup_num_tokens": 2}),
    ("no_cache", {"use_cache": False}),
]
STEPS = 4


def cache_argument(model):
    """What the forward of this transformers calls its cache; outputs name it alike."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def window_of(config, layer):
    """How many tokens ``layer`` sees, or None for all."""
    kinds = getattr(config, "layer_types", None)
    return None if kinds is not None and kinds[layer] == "full_attention" else getattr(config, "sliding_window", None)


class GenerationTesterMixin:
    """The behaviours that upstream's mixin of this name checks for a decoder."""

    def _model(self, batch_size=2):
        """Every generative class with a prompt; end-of-sequence never stops it, so that all steps run."""
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            set_seed(0)
            model = model_class(config).eval()
            model.generation_config.eos_token_id = None
            ids = inputs["input_ids"][:batch_size].clamp(min=3)
            yield model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _generate(self, model, inputs, **kwargs):
        set_seed(0)
        kwargs = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True} | kwargs
        return model.generate(**inputs, **kwargs)

    @parameterized.expand(MODES)
    def test_generate(self, name, mode):
        for model, inputs in self._model(1 if name == "prompt_lookup" else 2):
            sequences = self._generate(model, inputs, **mode).sequences
            assert sequences.shape[1] == inputs["input_ids"].shape[1] + STEPS
            plain = model.generate(**inputs, max_new_tokens=STEPS, **({"do_sample": False} | mode))
            assert plain.shape == sequences.shape

    @parameterized.expand([mode for mode in MODES if mode[0] != "prompt_lookup"])
    def test_generate_dict_outputs(self, name, mode):
        for model, inputs in self._model():
            model.set_attn_implementation("eager")
            outputs = self._generate(
                model,
                inputs,
                output_scores=True,
                output_logits=True,
                output_attentions=True,
                output_hidden_states=True,
                **mode,
            )
            prompt, rows = inputs["input_ids"].shape[1], inputs["input_ids"].shape[0] * mode.get("num_beams", 1)
            assert [len(outputs[k]) for k in ("scores", "logits", "attentions", "hidden_states")] == [STEPS] * 4
            for step, (attentions, hidden) in enumerate(zip(outputs.attentions, outputs.hidden_states, strict=True)):
                queries = prompt if step == 0 else prompt + step if not mode.get("use_cache", True) else 1
                heads = model.config.num_attention_heads
                assert len(attentions) == model.config.num_hidden_layers
                for layer, weights in enumerate(attentions):
                    keys, window = prompt + step, window_of(model.config, layer)
                    # A cache has no more than the window, once it holds any token.
                    cached = window is not None and step > 0 and mode.get("use_cache", True)
                    assert weights.shape == (rows, heads, queries, min(keys, window) if cached else keys)
                assert hidden[-1].shape == (rows, queries, model.config.hidden_size)
            if mode.get("use_cache", True):
                cache = outputs[cache_argument(model)]
                assert isinstance(cache, DynamicCache)
                assert cache.get_seq_length() == prompt + STEPS - 1

    def test_generate_without_input_ids(self):
        for model, _ in self._model():
            assert model.generate(max_new_tokens=3, bos_token_id=1, do_sample=False) is not None

    @parameterized.expand(["random", "same"])
    def test_assisted_decoding_matches_greedy_search(self, assistant):
        for model, inputs in self._model(1):
            helper = model if assistant == "same" else copy.deepcopy(model).apply(model._init_weights)
            helper = helper.eval()
            helper.generation_config.num_assistant_tokens = 2
            greedy = self._generate(model, inputs, max_new_tokens=10, output_scores=True)
            assisted = self._generate(model, inputs, max_new_tokens=10, output_scores=True, assistant_model=helper)
            assert greedy.sequences.tolist() == assisted.sequences.tolist()
            torch.testing.assert_close(torch.stack(greedy.scores), torch.stack(assisted.scores), atol=1e-4, rtol=1e-4)

    def test_assisted_decoding_sample(self):
        for model, inputs in self._model(1):
            helper = copy.deepcopy(model)
            self._generate(model, inputs, do_sample=True, assistant_model=helper)

    def test_prompt_lookup_decoding_matches_greedy_search(self):
        for model, inputs in self._model(1):
            greedy = self._generate(model, inputs, max_new_tokens=10)
            lookup = self._generate(model, inputs, max_new_tokens=10, prompt_lookup_num_tokens=2)
            assert greedy.sequences.tolist() == lookup.sequences.tolist()

    def test_left_padding_compatibility(self):
        for model, inputs in self._model():
            short = model(**inputs, use_cache=False).logits[:, -1]
            padding = torch.zeros(inputs["input_ids"].shape[0], 5, dtype=torch.long)
            padded = {k: torch.cat([padding, v], 1) for k, v in inputs.items()}
            padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).masked_fill(
                padded["attention_mask"] == 0, 1
            )
            torch.testing.assert_close(model(**padded).logits[:, -1], short, atol=1e-5, rtol=1e-5)
            del padded["position_ids"]
            new = self._generate(model, padded).sequences[:, padded["input_ids"].shape[1] :]
            assert new.tolist() == self._generate(model, inputs).sequences[:, -STEPS:].tolist()

    def test_past_key_values_format(self):
        for model, inputs in self._model():
            cache = model(**inputs, use_cache=True)[cache_argument(model)]
            config = model.config
            assert isinstance(cache, DynamicCache)
            for index, layer in enumerate(cache.layers):
                length, window = inputs["input_ids"].shape[1], window_of(config, index)
                kept = length if window is None else min(length, window - 1)
                shape = (2, config.num_key_value_heads, kept, config.head_dim)
                assert (layer.keys.shape, layer.values.shape) == (shape, shape)

    @parameterized.expand([("greedy", 1), ("beam", 2)])
    def test_generate_from_inputs_embeds(self, name, num_beams):
        for model, inputs in self._model():
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            scores = {"output_scores": True, "num_beams": num_beams}
            a = self._generate(model, inputs, **scores)
            b = self._generate(model, inputs | {"inputs_embeds": embeds}, **scores)
            c = self._generate(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, **scores)
            assert a.sequences[:, -STEPS:].tolist() == c.sequences[:, -STEPS:].tolist()
            torch.testing.assert_close(torch.stack(a.scores), torch.stack(b.scores), atol=1e-5, rtol=1e-5)

    def test_generate_from_random_inputs_embeds(self):
        for model, _ in self._model():
            embeds = torch.rand(2, 6, model.config.hidden_size)
            outputs = self._generate(model, {"inputs_embeds": embeds})
            assert outputs.sequences.shape == (2, STEPS)

    @parameterized.expand(["input_ids", "inputs_embeds"])
    def test_generate_with_static_cache(self, kind):
        for model, inputs in self._model():
            if kind == "inputs_embeds":
                inputs = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
            dynamic = self._generate(model, inputs, output_logits=True)
            model._compile_all_devices = False
            static = self._generate(
                model, inputs, output_logits=True, cache_implementation="static", disable_compile=True
            )
            assert isinstance(static[cache_argument(model)], StaticCache)
            assert dynamic.sequences.tolist() == static.sequences.tolist()
            torch.testing.assert_close(torch.stack(dynamic.logits), torch.stack(static.logits), atol=1e-5, rtol=1e-5)

    def test_offloaded_and_user_caches(self):
        for model, inputs in self._model():
            want = self._generate(model, inputs).sequences.tolist()
            name = cache_argument(model)
            cache = DynamicCache(config=model.config)
            assert self._generate(model, inputs, **{name: cache}).sequences.tolist() == want
            static = StaticCache(config=model.config, max_cache_len=32)
            outputs = self._generate(model, inputs, **{name: static}, disable_compile=True)
            assert outputs.sequences.tolist() == want

    def test_generate_continue_from_past_key_values(self):
        for model, inputs in self._model():
            whole = self._generate(model, inputs, max_new_tokens=6)
            half = self._generate(model, inputs, max_new_tokens=3)
            longer = {"input_ids": half.sequences, "attention_mask": torch.ones_like(half.sequences)}
            name = cache_argument(model)
            rest = self._generate(model, longer, max_new_tokens=3, **{name: half[name]})
            assert whole.sequences.tolist() == rest.sequences.tolist()
            for a, b in zip(whole[name].layers, rest[name].layers, strict=True):
                torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)

    def test_generate_methods_with_logits_to_keep(self):
        for model, inputs in self._model():
            want = self._generate(model, inputs).sequences.tolist()
            assert self._generate(model, inputs, logits_to_keep=0).sequences.tolist() == want
            full = model(**inputs).logits
            torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, full[:, -2:], atol=1e-6, rtol=1e-5)
            picked = torch.tensor([0, 3])
            torch.testing.assert_close(
                model(**inputs, logits_to_keep=picked).logits, full[:, picked], atol=1e-6, rtol=1e-5
            )

    def test_eager_matches_sdpa_generate(self):
        for model, inputs in self._model():
            if not model._supports_sdpa:
                self.skipTest("sdpa has no learned sinks")
            outputs = {}
            for name in ("eager", "sdpa"):
                model.set_attn_implementation(name)
                outputs[name] = self._generate(model, inputs, output_scores=True)
            eager, sdpa = outputs.values()
            assert eager.sequences.tolist() == sdpa.sequences.tolist()
            torch.testing.assert_close(torch.stack(eager.scores), torch.stack(sdpa.scores), atol=1e-4, rtol=1e-4)

    def test_custom_4d_mask(self):
        for model, inputs in self._model(1):
            masks = {}
            for layer in range(model.config.num_hidden_layers):
                window = window_of(model.config, layer)
                length = inputs["input_ids"].shape[1]
                seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - (window or length))
                if model.config._attn_implementation == "eager":
                    seen = torch.zeros_like(seen, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
                masks["full_attention" if window is None else "sliding_attention"] = seen[None, None]
            # Models whose layers differ take a mask for each kind.
            mask = masks if len(masks) > 1 else masks.popitem()[1]
            got = model(inputs["input_ids"], attention_mask=mask).logits
            torch.testing.assert_close(got, model(**inputs).logits, atol=1e-5, rtol=1e-5)

    def test_generate_compile_model_forward_fullgraph(self):
        for model, inputs in self._model():
            want = self._generate(model, inputs, cache_implementation="static", disable_compile=True)
            torch.compiler.reset()
            model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
            got = self._generate(model, inputs, cache_implementation="static", disable_compile=True)
            assert want.sequences.tolist() == got.sequences.tolist()

    def test_torch_compile_with_and_without_graph_breaks(self):
        for model, inputs in self._model():
            want = model(**inputs, use_cache=False).logits
            torch.compiler.reset()
            explanation = torch._dynamo.explain(model)(**inputs, use_cache=False)
            assert explanation.graph_break_count == 0, explanation.break_reasons
            got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False).logits
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

    @parameterized.expand([("static", None), ("dynamic", True)])
    def test_torch_export(self, name, dynamic):
        for model, inputs in self._model():
            auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
            shapes = dict.fromkeys(inputs, auto) | {"use_cache": None} if dynamic else None
            program = torch.export.export(model, (), inputs | {"use_cache": False}, dynamic_shapes=shapes, strict=False)
            got = program.module()(**inputs, use_cache=False).logits
            torch.testing.assert_close(got, model(**inputs, use_cache=False).logits, atol=1e-5, rtol=1e-5)

    def test_exporter_dynamo(self):
        from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).eval()
            with torch.no_grad():
                DynamoExporter().export(model, inputs, DynamoConfig())

    def test_generation_config_round_trip(self):
        for model, inputs in self._model():
            model.generation_config.top_k = 7
            model.generation_config.do_sample = True
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                loaded = type(model).from_pretrained(folder)
            assert loaded.generation_config.top_k == 7
            expected = self._generate(model, inputs).sequences.tolist()
            assert self._generate(loaded.eval(), inputs).sequences.tolist() == expected

    def test_pickle_and_deepcopy(self):
        for model, inputs in self._model():
            with tempfile.NamedTemporaryFile() as file:
                torch.save(model, file.name)
                loaded = torch.load(file.name, weights_only=False)
            for other in (loaded, copy.deepcopy(model)):
                assert type(other) is type(model)
                torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits, atol=0, rtol=0)
