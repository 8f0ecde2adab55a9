"""Training on a tiny model: what is learnt, what stays frozen, and what a kill cannot lose."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save

from reft_edge.adapter.config import INTERVENTIONS
from reft_edge.adapter.file import load_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.export import Quantisation, export_model
from reft_edge.model.loading import load_model
from reft_edge.model.prompts import load_prompts
from reft_edge.model.source import ModelFolder
from reft_edge.runtime import SteeredModel
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from reft_edge.training.data import Dataset, load_dataset
from reft_edge.training.description import curve
from reft_edge.training.distributed import Processes
from reft_edge.training.objectives import batch_loss, evaluate
from reft_edge.training.run import train
from reft_edge.training.settings import Execution, TrainSettings
from reft_edge.training.trainer import CHECK_EVERY, Trainer, grouped, rate
from reft_edge.training.turns import Example
from tests.helpers.tiny import make_model
from tests.helpers.torch_reference import logits, random_adapter

CPU = torch.device("cpu")


@pytest.fixture
def model(device_folder):
    return load_model(ModelFolder(device_folder / "hf", "tiny"))


@pytest.fixture(scope="module")
def data(device_folder, tmp_path_factory) -> Dataset:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    answers = ["I am well.", "ice melts", "the lazy dog", "thank you"]
    path.write_text(
        "\n".join(
            json.dumps({"prompt": f"Question {i}?" * (1 + i % 3), "completion": answers[i % 4]})
            for i in range(12)
        )
    )
    return load_dataset(path, load_prompts(device_folder / "hf"), "chat", 999)


def settings(**changes):
    return TrainSettings(
        **{"lr": 5e-3, "max_steps": 6, "batch_size": 4, "positions": "f3+l3", "dtype": "fp32", **changes}
    )


def run(model, data, path, **changes):
    options = {
        key: changes.pop(key)
        for key in ("resume", "save_every", "evaluation", "on_step", "base_weights", "report")
        if key in changes
    }
    return train(model, "tiny", data, path, settings(**changes), **options)


def test_batch_loss_is_the_plain_loss_of_each_row(model, data):
    """Padding, the head's gathered tokens and given prompt lengths change nothing."""
    adapter = Interventions.from_adapter(random_adapter(model, positions="f3+l3+gen"))
    rows = data.examples[:5]
    with steered(model, (adapter, 1.0)) as steering, torch.no_grad():
        together = float(batch_loss(model, steering, rows, CPU, autocast=False))
        alone = 0.0
        for row in rows:
            with steering.prompts(torch.tensor([len(row.prompt)])):
                predicted = logits(model, list(row.prompt + row.completion))[len(row.prompt) - 1 : -1]
            alone += float(
                torch.nn.functional.cross_entropy(predicted, torch.tensor(row.completion), reduction="sum")
            )
        mean = evaluate(model, steering, rows, 2, CPU, autocast=False)
    assert together == pytest.approx(alone, rel=1e-5)
    assert mean == pytest.approx(alone / sum(len(row.completion) for row in rows), rel=1e-5)


@pytest.mark.parametrize(
    ("intervention", "start"),
    [
        *((kind, "random") for kind in INTERVENTIONS),
        *(
            (kind, "auto") for kind in INTERVENTIONS if kind != "lobireft"
        ),  # which only shifts, and so learns 3 %
    ],
)
def test_every_intervention_learns_and_leaves_the_base_alone(model, data, tmp_path, intervention, start):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = [parameter.requires_grad for parameter in model.parameters()]
    losses = []
    result = run(
        model,
        data,
        tmp_path / "a.safetensors",
        intervention=intervention,
        start=start,
        max_steps=40,
        lr=0.02,
        batch_size=12,
        rank=1 if intervention in ("steering", "red") else 4,
        on_step=lambda step: losses.append(step.loss),
    )
    assert np.mean(losses[-4:]) < 0.95 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert result.parameters == adapter.num_parameters
    assert result.size == (tmp_path / "a.safetensors").stat().st_size
    assert result.base_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_saved_adapter_is_what_was_trained(model, data, tmp_path):
    result = run(model, data, tmp_path / "a.safetensors", max_steps=10, evaluation=data)
    adapter = load_adapter(tmp_path / "a.safetensors")
    with steered(model, (Interventions.from_adapter(adapter), 1.0)) as steering:
        assert evaluate(model, steering, data.examples, 4, CPU, autocast=False) == pytest.approx(
            result.evaluation, rel=1e-4
        )
    training = adapter.config.training
    assert training["steps"] == 10
    assert training["data_sha256"] == data.digest
    assert training["evaluation_loss"] == pytest.approx(result.evaluation, abs=1e-5)
    assert {"lr", "seed", "versions", "loss", "dtype"} <= training.keys()


def test_held_out_rows_are_read_without_dropout(model, data, tmp_path):
    """And dropout is on again for what is trained after."""
    result = run(model, data, tmp_path / "a", dropout=0.9, evaluation=data)
    adapter = Interventions.from_adapter(load_adapter(tmp_path / "a"), dropout=0.9)
    with steered(model, (adapter, 1.0)) as steering, torch.no_grad():
        assert evaluate(model, steering, data.examples, 4, CPU, autocast=False) == pytest.approx(
            result.evaluation, rel=1e-4
        )
        assert adapter.training
        dropped = float(batch_loss(model, steering, data.examples, CPU, autocast=False))
    tokens = sum(len(row.completion) for row in data.examples)
    assert dropped / tokens != pytest.approx(result.evaluation, rel=1e-3)


def test_the_same_seed_trains_the_same_adapter(model, data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(model, data, tmp_path / name, seed=seed, dropout=0.1)
    a, b, c = (load_adapter(tmp_path / name).tensors["W"] for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_accumulation_equals_one_large_batch(model, data, tmp_path):
    run(model, data, tmp_path / "whole", batch_size=12)
    run(model, data, tmp_path / "parts", batch_size=4, accumulate=3)
    for name, tensor in load_adapter(tmp_path / "whole").tensors.items():
        np.testing.assert_allclose(load_adapter(tmp_path / "parts").tensors[name], tensor, atol=2e-4)


@pytest.mark.parametrize("kill_at", [5, 7])
def test_resume_after_a_kill_ends_at_the_same_adapter(model, data, tmp_path, kill_at):
    """Killed between checkpoints: the steps since the last one are done again, with the same rows and dropout."""
    run(model, data, tmp_path / "whole", max_steps=10, dropout=0.1)

    class Killed(BaseException):
        pass

    def kill(step):
        if step.step == kill_at:
            raise Killed

    path = tmp_path / "resumed"
    with pytest.raises(Killed):
        run(model, data, path, max_steps=10, dropout=0.1, save_every=3, on_step=kill)
    assert not path.exists()
    steps = []
    run(
        model,
        data,
        path,
        max_steps=10,
        dropout=0.1,
        save_every=3,
        resume=True,
        on_step=lambda step: steps.append(step.step),
    )
    assert steps == list(range(kill_at // 3 * 3 + 1, 11))
    for name, tensor in load_adapter(tmp_path / "whole").tensors.items():
        np.testing.assert_allclose(load_adapter(path).tensors[name], tensor, atol=1e-6)
    assert load_adapter(path).config == load_adapter(tmp_path / "whole").config
    assert sorted(file.name for file in tmp_path.iterdir()) == ["resumed", "whole"]


def test_an_interrupt_saves_the_last_step(model, data, tmp_path):
    def interrupt(step):
        if step.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "a", on_step=interrupt)
    said, steps = [], []
    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "a", on_step=interrupt, report=said.append)
    assert "which --resume would continue" in said[0]
    run(model, data, tmp_path / "a", resume=True, on_step=lambda step: steps.append(step.step))
    assert steps == [5, 6]


def test_an_interrupt_inside_the_optimiser_saves_nothing_that_is_half_a_step(
    model, data, tmp_path, monkeypatch
):
    """The parameters have moved, the step is not counted yet: the checkpoint before it is what goes on."""
    run(model, data, tmp_path / "whole")
    move, moves = torch.optim.AdamW.step, []

    def interrupted(optimizer):
        move(optimizer)
        moves.append(optimizer)
        if len(moves) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, data, tmp_path / "a", save_every=2)
    steps = []
    run(model, data, tmp_path / "a", resume=True, on_step=lambda step: steps.append(step.step))
    assert steps == [5, 6]
    for name, tensor in load_adapter(tmp_path / "whole").tensors.items():
        np.testing.assert_allclose(load_adapter(tmp_path / "a").tensors[name], tensor, atol=1e-6)


@pytest.mark.parametrize("failing", ["steps.evaluate", "output.save_adapter"])
def test_a_finished_training_is_not_lost_by_what_comes_after_it(model, data, tmp_path, monkeypatch, failing):
    def fail(*given):
        raise ReftEdgeError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(f"reft_edge.training.{failing}", fail)
        with pytest.raises(ReftEdgeError, match="no space left"):
            run(model, data, tmp_path / "a", evaluation=data)
    steps = []
    result = run(model, data, tmp_path / "a", evaluation=data, resume=True, on_step=steps.append)
    assert steps == []
    run(model, data, tmp_path / "whole", evaluation=data)
    whole = load_adapter(tmp_path / "whole")
    assert result.evaluation == pytest.approx(whole.config.training["evaluation_loss"], abs=1e-5)
    for name, tensor in whole.tensors.items():
        np.testing.assert_allclose(load_adapter(tmp_path / "a").tensors[name], tensor, atol=1e-6)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "whole"]


def test_a_checkpoint_of_the_same_file_cut_elsewhere_is_refused(model, data, tmp_path):
    def interrupt(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "a", on_step=interrupt)
    shorter = dataclasses.replace(data, examples=data.examples[:-1], left_out=1)
    with pytest.raises(ReftEdgeError, match="of another training; these differ: rows"):
        run(model, shorter, tmp_path / "a", resume=True)


def test_a_checkpoint_of_another_training_is_refused(model, data, tmp_path):
    def interrupt(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "a", on_step=interrupt)
    with pytest.raises(ReftEdgeError, match="of another training; these differ: lr, rank"):
        run(model, data, tmp_path / "a", resume=True, lr=1e-3, rank=2)
    tensors = {"losses": torch.zeros(1)}
    for content in (
        b"junk",
        save(tensors),
        *(save(tensors, {"step": "1", "belongs_to": b}) for b in ("{}", "[]")),
    ):
        (tmp_path / "a.checkpoint").write_bytes(content)
        with pytest.raises(ReftEdgeError, match="not a usable checkpoint"):
            run(model, data, tmp_path / "a", resume=True)


def test_rows_of_an_epoch_are_all_seen_once(model, data):
    trainer = Trainer(
        model,
        Interventions(random_adapter(model).config),
        settings(max_steps=None, epochs=2, batch_size=5),
        data,
        CPU,
    )
    assert trainer.steps == 6
    epochs = [[row for step in range(start, start + 3) for row in trainer.rows(step)] for start in (0, 3)]
    for epoch in epochs:
        assert sorted(map(repr, epoch)) == sorted(map(repr, data.examples))
    assert epochs[0] != epochs[1]


def unlike_lengths(count: int) -> Dataset:
    lengths = np.random.default_rng(3).integers(2, 60, count)
    rows = [Example(tuple(range(length)), (i,)) for i, length in enumerate(lengths)]
    return Dataset(rows, 0, "digest")


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_rows_of_like_length_share_a_batch(model, accumulate, processes):
    """Every row once an epoch, in every process count; less padding; shuffled anew each epoch; the last pass not full."""
    data, size = unlike_lengths(130), 8

    def epochs(**changes):
        chosen = settings(max_steps=None, epochs=2, batch_size=size, accumulate=accumulate, **changes)
        trainer = Trainer(model, Interventions(random_adapter(model).config), chosen, data, CPU)
        steps = [trainer.rows(step) for step in range(trainer.steps)]
        passes = [rows[start : start + size] for rows in steps for start in range(0, len(rows), size)]
        return passes[: len(passes) // 2], passes[len(passes) // 2 :]

    def padding(passes):
        lengths = [[len(row.prompt) for row in rows] for rows in passes]
        return sum(max(row) * len(row) - sum(row) for row in lengths)

    first, second = epochs(group_by_length=True)
    plain, _ = epochs()
    for passes in (first, second):
        shares = [
            Processes(rank=rank, count=processes).share(rows) for rows in passes for rank in range(processes)
        ]
        seen = [row for rows, weight in shares for row in rows if weight]
        assert sorted(map(repr, seen)) == sorted(map(repr, data.examples))
        assert [len(rows) for rows in passes] == [size] * 16 + [2]
        assert padding(passes) < 0.4 * padding(plain)
        longest = [max(len(row.prompt) for row in rows) for rows in passes]
        assert longest not in (sorted(longest), sorted(longest, reverse=True))
    assert {frozenset(rows) for rows in first}.isdisjoint(frozenset(rows) for rows in second)
    assert epochs(group_by_length=True) == (first, second)
    assert epochs(group_by_length=True, seed=1) != (first, second)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_few_rows_can_be_grouped_too(count):
    lengths = np.arange(count)[::-1].copy()
    found = grouped(np.arange(count), lengths, 8, np.random.default_rng(0))
    assert sorted(found) == list(range(count))


def test_grouped_rows_are_trained_on_and_noted(model, data, tmp_path):
    run(model, data, tmp_path / "a", group_by_length=True, accumulate=2, batch_size=2)
    assert load_adapter(tmp_path / "a").config.training["group_by_length"] is True


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9]),
    ],
)
def test_schedules(schedule, expected):
    chosen = settings(schedule=schedule, warmup=0.25)
    assert [rate(chosen, step, 12) for step in range(12)] == pytest.approx(expected)
    cosine = [rate(settings(schedule="cosine", warmup=0), step, 100) for step in range(100)]
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[0] == 1
    assert cosine[-1] < 0.001


def test_the_head_only_sees_tokens_with_a_label(model, data):
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with (
        steered(model, (Interventions.from_adapter(random_adapter(model)), 1.0)) as steering,
        torch.no_grad(),
    ):
        batch_loss(model, steering, data.examples, CPU, autocast=False)
    assert seen == [(1, sum(len(row.completion) for row in data.examples), 320)]


def test_nothing_is_computed_below_the_lowest_layer(model, data):
    """No gradient flows into the blocks under the first intervention."""
    adapter = Interventions.from_adapter(random_adapter(model, layers=(2,)))
    seen = []
    model.model.layers[1].register_forward_hook(
        lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).requires_grad)
    )
    with steered(model.requires_grad_(False), (adapter, 1.0)) as steering:
        batch_loss(model, steering, data.examples[:2], CPU, autocast=False).backward()
    assert seen == [False]
    assert adapter.trained["W"].grad is not None


def test_bf16_trains_too(model, data, tmp_path):
    losses = []
    run(
        model,
        data,
        tmp_path / "a",
        dtype="bf16",
        max_steps=20,
        lr=0.02,
        batch_size=12,
        on_step=lambda step: losses.append(step.loss),
    )
    assert losses[-1] < losses[0]
    assert load_adapter(tmp_path / "a").config.training["dtype"] == "bf16"


def test_a_loss_that_is_not_finite_stops_with_a_reason(model, data, tmp_path):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ReftEdgeError, match=r"the loss is (nan|inf) at step 1; lower the learning rate"):
        run(model, data, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_rotation_that_is_not_orthonormal_stops_the_training(model, data, tmp_path, monkeypatch):
    """As it would be under a parametrisation that drifts: found at the next check, and nothing is written."""
    rotations, steps = [], []
    monkeypatch.setattr(
        "reft_edge.training.run.Interventions",
        lambda *given: rotations.append(Interventions(*given)) or rotations[0],
    )

    def drift(step):
        steps.append(step.step)
        if step.step == 3:
            rotations[0].rotation.base_signs.mul_(0.9)

    with pytest.raises(ReftEdgeError, match=r"R is no longer orthonormal \(off by 0\.\d+\); lower the"):
        run(model, data, tmp_path / "a", max_steps=100, on_step=drift)
    assert steps[-1] == CHECK_EVERY - 1
    assert list(tmp_path.iterdir()) == []


def test_weight_decay_leaves_the_rotation_orthonormal(model, data, tmp_path):
    run(model, data, tmp_path / "a", max_steps=8, weight_decay=0.1)
    run(model, data, tmp_path / "b", max_steps=8)
    decayed, plain = (load_adapter(tmp_path / name).tensors for name in "ab")
    gram = decayed["R"] @ np.swapaxes(decayed["R"], -1, -2)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(4), gram.shape), atol=1e-5)
    assert np.abs(decayed["W"]).sum() < np.abs(plain["W"]).sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in": "2bit"}, "load_in is '2bit'; expected 4bit or 8bit"),
        ({"load_in": "4bit"}, "load_in is for a model that load_quantised gave"),
        ({"save_every": 0}, "save_every is 0; expected 1 or more"),
        ({"lr": 0}, "lr is 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"warmup": 1}, "warmup is 1"),
        ({"schedule": "step"}, "one of linear, cosine, constant"),
        ({"dtype": "fp8"}, "one of auto, fp32, bf16"),
        ({"layers": "7"}, "no layer 7"),
        ({"positions": "z1"}, "cannot read"),
        ({"intervention": "lora"}, "unknown intervention"),
        ({"rank": 100}, "rank 100 is larger than the hidden size 64"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"act_fn": "bent"}, "unknown act_fn"),
    ],
)
def test_bad_settings(model, data, tmp_path, changes, message):
    with pytest.raises(ReftEdgeError, match=message):
        run(model, data, tmp_path / "a", **changes)


@pytest.mark.parametrize("device", ["tpu9", "cuda:77"])
def test_bad_devices(model, data, tmp_path, device):
    with pytest.raises(ReftEdgeError, match=f"cannot compute on device '{device}'"):
        train(model, "tiny", data, tmp_path / "a", settings(), execution=Execution(device=device))


def test_a_bad_place_is_found_before_training(model, data, tmp_path):
    for path, message in ((tmp_path / "none" / "a.safetensors", "does not exist"), (tmp_path, "is a folder")):
        steps = []
        with pytest.raises(ReftEdgeError, match=message):
            run(model, data, path, on_step=steps.append)
        assert steps == []


def test_loss_is_taken_on_completions_only(model):
    """The prompt's own predictability does not matter: the loss of a row is that of its completion's tokens."""
    row = Example((5, 6, 7, 8, 9, 10), (20, 21))
    adapter = Interventions.from_adapter(random_adapter(model, positions="l1"))
    with steered(model, (adapter, 1.0)) as steering, torch.no_grad():
        loss = float(batch_loss(model, steering, [row], CPU, autocast=False))
        with steering.prompts(torch.tensor([6])):
            predicted = torch.log_softmax(logits(model, [5, 6, 7, 8, 9, 10, 20]), -1)
    assert loss == pytest.approx(-float(predicted[5, 20] + predicted[6, 21]), rel=1e-5)


@pytest.fixture(scope="module")
def int4(device_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4") / "export"
    quantisation = Quantisation("rtn", accuracy_level=1)
    export_model(ModelFolder(device_folder / "hf", "tiny"), folder, "int4", quantisation=quantisation)
    return folder


def test_base_weights_are_those_that_the_device_multiplies_with(model, data, tmp_path, int4):
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rounded = run(model, data, tmp_path / "rounded", base_weights=int4)
    adapter = load_adapter(tmp_path / "rounded")
    assert adapter.config.training["base_weights"]["precision"] == "int4"
    ids = list(data.examples[0].prompt)
    with steered(model, (Interventions.from_adapter(adapter), 1.0)):
        expected = logits(model, ids).numpy()
    device = SteeredModel(int4, "cpu")
    device.load_adapter(tmp_path / "rounded", name="task")
    assert np.abs(device.logits([ids], "task")[0] - expected).max() <= 1e-3
    assert rounded.base_parameters == parameters


def test_base_weights_of_another_model_are_refused(data, tmp_path, int4):
    other = load_model(ModelFolder(make_model(tmp_path / "hf", seed=1), "other"))
    with pytest.raises(ReftEdgeError, match=r"is an export of tiny with fingerprint .* not of this model"):
        run(other, data, tmp_path / "adapter", base_weights=int4)
    with pytest.raises(ReftEdgeError, match="is not an exported model"):
        run(other, data, tmp_path / "adapter", base_weights=tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_the_file_keeps_a_short_loss_curve(model, data, tmp_path):
    losses = []
    run(model, data, tmp_path / "a", max_steps=9, on_step=lambda step: losses.append(step.loss))
    kept = load_adapter(tmp_path / "a").config.training["curve"]
    assert [step for step, _ in kept] == list(range(1, 10))
    assert [loss for _, loss in kept] == pytest.approx(losses, rel=1e-4)
    long = np.arange(1000.0)
    short = curve(long)
    assert len(short) == 64
    assert short[-1][0] == 1000
    starts = [0, *(int(step) for step, _ in short[:-1])]
    for start, (step, loss) in zip(starts, short, strict=True):
        assert loss == pytest.approx(long[start : int(step)].mean(), rel=1e-4)
