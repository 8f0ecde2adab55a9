"""The runtime on a tiny exported model. Runs without torch: what PyTorch said comes from `device_folder`."""

import json
from pathlib import Path

import numpy as np
import pytest

from reft_edge.errors import AdapterFileError, BaseMismatchError, ReftEdgeError
from reft_edge.runtime import Sampling, SteeredModel

PROMPT = "Who are you?"


@pytest.fixture(scope="module")
def model(device_folder: Path) -> SteeredModel:
    model = SteeredModel(device_folder / "export", device="cpu")
    for name in ("first", "everywhere", "opening"):
        assert model.load_adapter(device_folder / f"{name}.safetensors") == name
    return model


@pytest.fixture(scope="module")
def expected(device_folder: Path) -> dict[str, list[int]]:
    return json.loads((device_folder / "expected.json").read_text())


def tokens(model: SteeredModel, adapter=None, **options) -> list[int]:
    answer = model.stream(PROMPT, adapter, max_tokens=24, **options)
    answer.text()
    return answer.tokens


def test_answers_are_pytorchs_and_do_not_depend_on_what_ran_before(model, expected):
    for adapter in (None, "first", "everywhere", "opening", None, "everywhere", "first", "opening"):
        assert tokens(model, adapter) == expected[adapter or "base"]
    assert len({tuple(answer) for answer in expected.values()}) == 4


@pytest.mark.parametrize("adapter", [None, "first", "everywhere", "opening"])
def test_prompts_of_unlike_lengths_are_answered_as_alone(model, adapter):
    prompts = [
        model.prompts.encode_prompt(text, "chat") for text in (PROMPT, "How?", "Water boils. " * 9, "A")
    ]
    alone = [model.generate_tokens([ids], adapter, 24)[0] for ids in prompts]
    assert model.generate_tokens(prompts, adapter, 24) == alone
    assert alone[0] == tokens(model, adapter)
    assert model.generate_tokens(prompts, adapter, 3) == [answer[:3] for answer in alone]
    assert len({tuple(answer) for answer in alone}) > 1


def test_prompts_that_cannot_be_answered_together_are_refused(model):
    for rows, message in (
        ([], "there are no prompts"),
        ([[5], []], "at least one token"),
        ([[5] * 300], "context"),
    ):
        with pytest.raises(ReftEdgeError, match=message):
            model.generate_tokens(rows, max_tokens=20)


def test_scale_0_is_the_base_and_1_the_adapter(model, expected):
    assert tokens(model, {"first": 0.0}) == expected["base"]
    assert tokens(model, {"first": 1.0, "everywhere": 0.0}) == expected["first"]


def test_two_adapters_at_once_differ_from_either(model):
    rows = [[5, 80, 33, 120, 7, 61, 19, 200]]
    logits = {
        name: model.logits(rows, adapter)[0]
        for name, adapter in {
            "base": None,
            "first": "first",
            "everywhere": "everywhere",
            "both": ["first", "everywhere"],
            "reversed": ["everywhere", "first"],
            "half": {"first": 0.5},
        }.items()
    }
    assert np.abs(logits["both"] - logits["reversed"]).max() < 1e-4
    for one in ("base", "first", "everywhere"):
        assert np.abs(logits["both"] - logits[one]).max() > 0.01
        assert np.abs(logits["half"] - logits[one]).max() > 0.01


def test_a_right_padded_batch_equals_the_rows_alone(model):
    random = np.random.default_rng(0)
    rows = [random.integers(2, 320, size).tolist() for size in (17, 3, 29, 8, 1)]
    for adapter in (None, "first", "everywhere", {"first": -0.5, "everywhere": 2.0}):
        for together, row in zip(model.logits(rows, adapter), rows, strict=True):
            alone = model.logits([row], adapter)[0]
            assert together.shape == (len(row), 320)
            assert np.abs(together - alone).max() <= 1e-4


@pytest.mark.parametrize("adapter", [None, "first", "everywhere"])
@pytest.mark.parametrize("chunk", [1, 5, 16, 30])
def test_chunked_prefill_equals_whole_prefill(model, adapter, chunk):
    ids = np.random.default_rng(1).integers(2, 320, (1, 37))
    whole = model.logits(ids.tolist(), adapter)[0][-1]
    graph = model.graph
    ports = {
        **model.prepare(adapter).prompt,
        **graph.to_device({"reft.prompt_len": np.array([37])}),
    }
    chunked = graph.bind(graph.take_cache(1, 37), ports).prefill(ids, chunk)[0]
    assert np.abs(chunked - whole).max() <= 1e-4


def test_decode_binds_no_ports_when_only_the_prompt_is_edited(model):
    assert model.prepare("first").decode == {}
    assert model.prepare("everywhere").decode != {}


def test_streaming_gives_the_same_text_in_pieces(model):
    pieces = list(model.stream(PROMPT, "first", max_tokens=24))
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate(PROMPT, "first", max_tokens=24)
    unfinished_left_out = model.prompts.decode(tokens(model, "first")).rstrip("\ufffd")
    assert "".join(pieces).rstrip("\ufffd") == unfinished_left_out


def test_two_streams_at_once_do_not_mix(model):
    one, two = model.stream(PROMPT, "first", max_tokens=12), model.stream(PROMPT, None, max_tokens=12)
    interleaved = [[], []]
    for _ in range(12):
        for stream, pieces in zip((one, two), interleaved, strict=True):
            pieces.append(next(stream, ""))
    assert ["".join(pieces) for pieces in interleaved] == [
        model.generate(PROMPT, "first", max_tokens=12),
        model.generate(PROMPT, None, max_tokens=12),
    ]


def test_figures_and_finish_reasons(model):
    answer = model.stream(PROMPT, max_tokens=5)
    assert answer.finish_reason is None
    answer.text()
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 5)
    assert answer.prompt_tokens == len(model.prompts.encode_prompt(PROMPT, "chat"))
    assert answer.prefill_seconds > 0
    assert answer.decode_seconds > 0
    whole = model.generate(PROMPT, "first", max_tokens=24)
    stopped = model.stream(PROMPT, "first", max_tokens=24, stop=[whole[4:7]])
    assert stopped.text() == whole[: whole.index(whole[4:7])]
    assert stopped.finish_reason == "stop"


def test_end_of_sequence_stops(model, expected):
    manifest = model.manifest
    try:
        model.manifest = type(manifest)(**{**vars(manifest), "eos_token_ids": (expected["base"][3],)})
        answer = model.stream(PROMPT, max_tokens=24)
        answer.text()
    finally:
        model.manifest = manifest
    assert answer.tokens == expected["base"][: expected["base"].index(expected["base"][3])]
    assert answer.finish_reason == "stop"


def test_raw_and_chat_prompts(model):
    chat = model.stream(PROMPT, max_tokens=1)
    assert (
        chat.prompt_tokens == model.stream([{"role": "user", "content": PROMPT}], max_tokens=1).prompt_tokens
    )
    assert chat.prompt_tokens > model.stream(PROMPT, raw=True, max_tokens=1).prompt_tokens
    with pytest.raises(ReftEdgeError, match="needs the chat template"):
        model.stream([{"role": "user", "content": PROMPT}], raw=True)


def test_sampling_is_repeatable(model):
    def answer(seed):
        return tokens(model, sampling=Sampling(temperature=1.5, top_k=50, seed=seed))

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_the_context_is_a_limit(model):
    length = model.manifest.context_length
    with pytest.raises(ReftEdgeError, match=f"this model's context is {length}: shorten it"):
        model.stream("ab " * length, raw=True)
    long = model.stream("ab " * (length // 3), raw=True, max_tokens=10**6)
    assert long.prompt_tokens > length // 4
    for _ in long:
        pass
    assert long.finish_reason in ("stop", "length")
    assert long.prompt_tokens + len(long.tokens) <= length


def test_unloading_and_replacing(model, device_folder, expected):
    model.load_adapter(device_folder / "everywhere.safetensors", name="swap")
    assert tokens(model, "swap") == expected["everywhere"]
    model.load_adapter(device_folder / "first.safetensors", name="swap")
    assert tokens(model, "swap") == expected["first"]
    assert set(model.adapters) == {"first", "everywhere", "opening", "swap"}
    model.unload_adapter("swap")
    with pytest.raises(
        ReftEdgeError, match="no adapter 'swap' is loaded; loaded: first, everywhere, opening"
    ):
        model.generate(PROMPT, "swap")


def test_another_base_is_refused_with_both_fingerprints(model, device_folder, tmp_path):
    import dataclasses

    from reft_edge.adapter.config import Adapter
    from reft_edge.adapter.file import load_adapter, save_adapter

    adapter = load_adapter(device_folder / "first.safetensors")
    foreign = Adapter(
        dataclasses.replace(adapter.config, base_fingerprint="feedfeedfeedfeed"), adapter.tensors
    )
    save_adapter(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(BaseMismatchError) as caught:
        model.load_adapter(tmp_path / "foreign.safetensors")
    assert "feedfeedfeedfeed" in str(caught.value)
    assert model.manifest.base_fingerprint in str(caught.value)


def test_act_fn_and_unported_layers_are_refused(model, device_folder, tmp_path):
    import dataclasses

    from reft_edge.adapter.config import Adapter
    from reft_edge.adapter.file import load_adapter, save_adapter

    adapter = load_adapter(device_folder / "first.safetensors")
    save_adapter(
        Adapter(dataclasses.replace(adapter.config, act_fn="relu"), adapter.tensors),
        tmp_path / "relu.safetensors",
    )
    with pytest.raises(ReftEdgeError, match="act_fn is 'relu'"):
        model.load_adapter(tmp_path / "relu.safetensors")
    manifest = model.manifest
    try:
        model.manifest = type(manifest)(**{**vars(manifest), "layers": (0, 2)})
        with pytest.raises(ReftEdgeError, match=r"layers 1, which have no port"):
            model.load_adapter(device_folder / "first.safetensors", name="x")
    finally:
        model.manifest = manifest


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(PROMPT, "none"), "no adapter 'none' is loaded"),
        (lambda m: m.generate(PROMPT, {"first": float("nan")}), "expected a finite number"),
        (lambda m: m.generate(PROMPT, max_tokens=0), "max_tokens is 0"),
        (lambda m: m.generate("", raw=True), "the prompt is empty"),
        (lambda m: m.logits([]), "no tokens to run"),
        (lambda m: m.logits([[1], []]), "no tokens to run"),
        (lambda m: m.load_adapter("missing.safetensors"), "cannot read adapter"),
        (lambda m: SteeredModel("nowhere"), "not an exported model"),
        (lambda m: SteeredModel("nowhere", device="tpu"), "not an exported model"),
    ],
)
def test_bad_requests(model, call, message):
    with pytest.raises(ReftEdgeError, match=message):
        call(model)


def test_malformed_adapters_leave_the_loaded_one(model, tmp_path, expected):
    (tmp_path / "first.safetensors").write_bytes(b"junk")
    with pytest.raises(AdapterFileError):
        model.load_adapter(tmp_path / "first.safetensors")
    assert tokens(model, "first") == expected["first"]


def test_devices(device_folder):
    import onnxruntime

    with pytest.raises(ReftEdgeError, match="unknown device 'tpu'"):
        SteeredModel(device_folder / "export", device="tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(ReftEdgeError, match=r"no CUDA provider .*reft-edge\[cuda\]"):
            SteeredModel(device_folder / "export", device="cuda")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "has version None"),
        ('{"version": 99}', "has version 99"),
        ('{"version": 1}', "is malformed"),
    ],
)
def test_bad_manifests(device_folder, tmp_path, content, message):
    (tmp_path / "reft_edge.json").write_text(content)
    with pytest.raises(ReftEdgeError, match=message):
        SteeredModel(tmp_path)


def test_a_manifest_cannot_point_elsewhere(device_folder, tmp_path):
    manifest = json.loads((device_folder / "export/reft_edge.json").read_text())
    (tmp_path / "reft_edge.json").write_text(json.dumps({**manifest, "graph": "../model.onnx"}))
    with pytest.raises(ReftEdgeError, match="outside its folder"):
        SteeredModel(tmp_path)


def test_a_damaged_graph_is_a_plain_error(device_folder, tmp_path):
    for file in (device_folder / "export").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes() if file.name != "model.onnx" else b"not a graph")
    with pytest.raises(ReftEdgeError, match="ONNX Runtime failed"):
        SteeredModel(tmp_path)


class FakeOptions:
    def __init__(self) -> None:
        self.entries = {}

    def add_session_config_entry(self, name, value):
        self.entries[name] = value


class FakeRuntime:
    """As much of the onnxruntime module as opening a graph needs; its CUDA provider may fail to start."""

    def __init__(self, starts: bool) -> None:
        self.starts, self.asked = starts, []

    def get_available_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def SessionOptions(self):  # noqa: N802
        return FakeOptions()

    def InferenceSession(self, path, options, providers):  # noqa: N802
        self.asked, self.options = providers, options
        names = [name if isinstance(name, str) else name[0] for name in providers]
        return type("Session", (), {"get_providers": lambda _: names if self.starts else names[-1:]})()


def test_cuda_is_asked_for_and_its_failure_is_told(monkeypatch):
    from reft_edge.runtime import onnx_runtime

    fake = FakeRuntime(starts=True)
    monkeypatch.setattr(onnx_runtime, "import_onnxruntime", lambda: fake)
    onnx_runtime.open_graph(Path("model.onnx"), "auto")
    assert [provider[0] for provider in fake.asked[:1]] == ["CUDAExecutionProvider"]
    assert fake.asked[0][1]["use_tf32"] == "0"
    onnx_runtime.open_graph(Path("model.onnx"), "cpu")
    assert fake.asked == ["CPUExecutionProvider"]
    fake.starts = False
    with pytest.raises(ReftEdgeError, match="could not start its CUDA provider"):
        onnx_runtime.open_graph(Path("model.onnx"), "cuda")


def test_provider_options_reach_cuda_and_are_refused_on_the_cpu(monkeypatch):
    from reft_edge.runtime import onnx_runtime

    fake = FakeRuntime(starts=True)
    monkeypatch.setattr(onnx_runtime, "import_onnxruntime", lambda: fake)
    onnx_runtime.open_graph(
        Path("model.onnx"), "cuda", provider_options={"gpu_mem_limit": "1", "use_tf32": "1"}
    )
    options = fake.asked[0][1]
    assert (options["gpu_mem_limit"], options["use_tf32"]) == ("1", "1")
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    with pytest.raises(ReftEdgeError, match=r"provider options \(gpu_mem_limit\) are for CUDA"):
        onnx_runtime.open_graph(Path("model.onnx"), "cpu", provider_options={"gpu_mem_limit": "1"})


def test_threads_spin_only_where_each_has_a_core(monkeypatch):
    from reft_edge.runtime import onnx_runtime

    fake = FakeRuntime(starts=True)
    monkeypatch.setattr(onnx_runtime, "import_onnxruntime", lambda: fake)
    monkeypatch.setattr(onnx_runtime, "_usable_cores", lambda: 2)
    onnx_runtime.open_graph(Path("model.onnx"), "cpu")
    assert (fake.options.intra_op_num_threads, fake.options.entries) == (2, {})
    onnx_runtime.open_graph(Path("model.onnx"), "cpu", threads=3)
    assert fake.options.intra_op_num_threads == 3
    assert fake.options.entries == {"session.intra_op.allow_spinning": "0"}
