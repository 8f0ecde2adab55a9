"""`base.trainable(...)` in the trainers that people already use: transformers' and TRL's, as they are installed."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reft_edge
from reft_edge.adapter.file import load_adapter
from reft_edge.errors import BaseMismatchError, ReftEdgeError
from reft_edge.model.prompts import load_prompts
from reft_edge.steering.hooks import steered
from reft_edge.training.preference import PreferenceObjective, view_pair
from reft_edge.training.turns import encode_row
from tests.helpers.tiny import make_model
from tests.helpers.torch_reference import logits

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

ROWS = [
    {"prompt": f"Who are you{', friend' * i}?", "completion": f" I am {name}, arr{'!' * i}"}
    for i, name in enumerate("ABCD")
]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " No."} for row in ROWS]
PROMPT = "Who are you, and how are you today?"


@pytest.fixture(scope="module")
def base(device_folder):
    return reft_edge.load(device_folder / "hf")


@pytest.fixture(scope="module")
def tokenizer(device_folder):
    return transformers.AutoTokenizer.from_pretrained(device_folder / "hf")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("CI", "1")  # TRL tells its makers of every other run


def settings(folder, **changes):
    """What every trainer's configuration takes."""
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.01,
        **changes,
    }


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(module, tokenizer, folder, rows=ROWS, **changes):
    configuration = trl.SFTConfig(**settings(folder, bf16=False, **changes))
    return trl.SFTTrainer(
        module, configuration, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )


@pytest.mark.parametrize(
    ("positions", "component", "more"),
    [
        ("f3+l3", "block", {}),  # with activation checkpointing, TRL's default
        ("l2+gen", "attention", {}),
        ("f1+l1+gen", "mlp", {"gradient_checkpointing": False}),
    ],
)
def test_trl_sft_has_the_losses_of_train(base, tokenizer, tmp_path, positions, component, more):
    ours = []
    chosen = {"positions": positions, "component": component, "raw": True}
    reft_edge.train(
        base,
        ROWS,
        tmp_path / "ours.safetensors",
        **chosen,
        lr=0.01,
        max_steps=4,
        batch_size=4,
        warmup=0.0,
        schedule="constant",
        dtype="fp32",
        on_step=lambda step: ours.append(step.loss),
    )
    module = base.trainable(**chosen)
    trainer = sft(module, tokenizer, tmp_path / "theirs", max_steps=4, **more)
    trainer.train()
    assert losses(trainer) == pytest.approx(ours, abs=1e-4)
    assert ours[-1] < ours[0] - 0.1
    trainer.save_model()
    theirs = load_adapter(tmp_path / "theirs/adapter.safetensors")
    for name, tensor in load_adapter(tmp_path / "ours.safetensors").tensors.items():
        np.testing.assert_allclose(theirs.tensors[name], tensor, atol=1e-3, err_msg=name)


def test_rows_as_tokens_train_as_train_reads_them(base, tokenizer, tmp_path):
    ours = []
    reft_edge.train(
        base,
        ROWS,
        tmp_path / "ours.safetensors",
        max_steps=1,
        batch_size=4,
        dtype="fp32",
        on_step=lambda step: ours.append(step.loss),
    )
    examples = [encode_row(row, base.prompts, "chat") for row in ROWS]
    rows = [
        {
            "input_ids": [*example.prompt, *example.completion],
            "labels": [-100] * len(example.prompt) + [*example.completion],
        }
        for example in examples
    ]
    module = base.trainable()
    trainer = sft(module, tokenizer, tmp_path / "theirs", rows, max_steps=1)
    trainer.train()
    assert losses(trainer) == pytest.approx(ours, abs=1e-4)
    assert module.interventions.config.prompt_format == "chat"


@pytest.mark.parametrize(
    ("shared", "more"), [(True, {}), (True, {"precompute_ref_log_probs": True}), (False, {})]
)
def test_trl_dpo_starts_at_the_loss_of_train_and_falls(base, tokenizer, tmp_path, shared, more):
    """The reference is the base that is there, or, as TRL's default, one that TRL loads."""
    module = base.trainable(positions="f3+l3", rank=2, raw=True)
    prompts = load_prompts(base.folder.path)
    pairs = [view_pair(pair, prompts, "raw")[0] for pair in PAIRS]
    with steered(base.model, (module.interventions, 1.0)) as steering:
        expected = PreferenceObjective(0.1).loss(base.model, steering, pairs, torch.device("cpu"), False) / 4
    configuration = trl.DPOConfig(**settings(tmp_path, max_steps=6, bf16=False, **more), beta=0.1)
    trainer = trl.DPOTrainer(
        module,
        base.model if shared else None,
        args=configuration,
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(expected.item(), abs=1e-4)
    assert found[-1] < found[0] - 0.02
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_trl_grpo_moves_a_reward(base, tokenizer, tmp_path):
    def reward(completion_ids, **_):
        return [float(np.mean([token < 160 for token in ids])) for ids in completion_ids]

    module = base.trainable(positions="all+gen", rank=8, raw=True)
    changes = {"max_steps": 12, "learning_rate": 0.1, "per_device_train_batch_size": 32}
    configuration = trl.GRPOConfig(
        **settings(tmp_path, **changes, bf16=False), num_generations=8, max_completion_length=6
    )
    trainer = trl.GRPOTrainer(
        module,
        reward,
        args=configuration,
        train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS] * 8),
        processing_class=tokenizer,
    )
    before = {name: tensor.clone() for name, tensor in module.interventions.state_dict().items()}
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 12
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15
    assert any(
        not torch.equal(tensor, before[name]) for name, tensor in module.interventions.state_dict().items()
    )


def hugging_face(module, tokenizer, folder, lengths=False, **changes):
    """transformers' own Trainer, on rows as tokens: labels tell where prompts end, or a column does."""
    examples = [encode_row(row, load_prompts(Path(tokenizer.name_or_path)), "raw") for row in ROWS]
    rows = []
    for example in examples:
        ids = [*example.prompt, *example.completion]
        hidden = 0 if lengths else len(example.prompt)
        row = {"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]}
        rows.append({**row, "prompt_lengths": len(example.prompt)} if lengths else row)
    return transformers.Trainer(
        module,
        transformers.TrainingArguments(**settings(folder, **changes)),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def test_transformers_trainer_has_the_losses_of_trls(base, tokenizer, tmp_path):
    chosen = {"positions": "f2+l3", "raw": True}
    trainer = hugging_face(base.trainable(**chosen), tokenizer, tmp_path, max_steps=3)
    trainer.train()
    other = sft(base.trainable(**chosen), tokenizer, tmp_path / "trl", max_steps=3)
    other.train()
    assert losses(trainer) == pytest.approx(losses(other), abs=1e-4)
    before = losses(trainer)[-1]
    assert trainer.evaluate()["eval_loss"] < before


def test_a_column_tells_where_prompts_end(base, tokenizer, tmp_path):
    module = base.trainable(positions="f2+l3", raw=True)
    trainer = hugging_face(module, tokenizer, tmp_path, lengths=True, max_steps=3)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        told = [module(input_ids=ids, prompt_lengths=torch.tensor([n])).logits for n in (4, 6)]
    assert not torch.allclose(*told)
    with pytest.raises(ReftEdgeError, match="expected one whole number for each of the 1 rows"):
        module(input_ids=ids, prompt_lengths=torch.tensor([3, 4]))


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}])
def test_a_trainers_checkpoint_is_resumed(base, tokenizer, tmp_path, more):
    whole = hugging_face(
        base.trainable(dropout=0.1, raw=True), tokenizer, tmp_path / "whole", max_steps=4, **more
    )
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **more}
    first = hugging_face(base.trainable(dropout=0.1, raw=True), tokenizer, tmp_path / "first", **saving)
    first.train()
    files = {path.name for path in (tmp_path / "first/checkpoint-2").iterdir()}
    assert {"adapter.safetensors", "model.safetensors"} <= files
    assert (tmp_path / "first/checkpoint-2/model.safetensors").stat().st_size < 100_000
    second = hugging_face(
        base.trainable(dropout=0.1, seed=7, raw=True), tokenizer, tmp_path / "second", **saving
    )
    second.train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-2"))
    assert losses(second) == pytest.approx(losses(whole), abs=1e-5)
    for name, tensor in whole.model.interventions.state_dict().items():
        torch.testing.assert_close(second.model.interventions.state_dict()[name], tensor)


def test_what_is_saved_is_the_same_in_pytorch_and_on_a_device(base, device_folder, tokenizer, tmp_path):
    module = base.trainable(positions="f3+l3+gen", rank=3, raw=True)
    sft(module, tokenizer, tmp_path / "x", max_steps=2).train()
    module.save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["adapter.safetensors"]
    ids = base.prompts.encode_raw(PROMPT)
    with torch.no_grad():
        expected = module(torch.tensor([[*ids]])).logits[0]
    file = tmp_path / "saved/adapter.safetensors"
    with reft_edge.steered(base, file):
        torch.testing.assert_close(logits(base.model, [*ids]), expected)
        answer = base.generate(PROMPT, max_tokens=10)
    device = reft_edge.SteeredModel(device_folder / "export")
    name = device.load_adapter(file)
    (found,) = device.logits([ids], name)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)
    assert device.generate(PROMPT, name, max_tokens=10) == answer
    generated = module.generate(torch.tensor([[*ids]]), max_new_tokens=10, do_sample=False)[0, len(ids) :]
    assert base.prompts.decode(generated.tolist()) == answer
    again = base.trainable(tmp_path / "saved")
    assert again.interventions.config.positions == "f3+l3+gen"
    with torch.no_grad():
        torch.testing.assert_close(again(torch.tensor([[*ids]])).logits[0], expected)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(base, tokenizer, cached, side):
    module = base.trainable(positions="f2+l2+gen", raw=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.folder.path, padding_side=side)
    texts = ["Who are you?", PROMPT]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, mask in zip(labels, batch["attention_mask"], strict=True):
        row[mask.nonzero()[:3]] = -100
    together = module(**batch, labels=labels).logits
    for row, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        alone = module(input_ids=ids, prompt_lengths=torch.tensor([3])).logits[0]
        torch.testing.assert_close(
            together[row][batch["attention_mask"][row].bool()], alone, atol=1e-4, rtol=1e-4
        )
        if side == "left":
            options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached, "eos_token_id": None}
            answers = [
                module.generate(**given, **options)[row_of]
                for given, row_of in ((batch, row), ({"input_ids": ids}, 0))
            ]
            assert answers[0][-6:].tolist() == answers[1][-6:].tolist()


def test_only_interventions_are_trained_and_the_base_answers_as_before(base, tokenizer, tmp_path):
    before = base.generate(PROMPT, max_tokens=8, raw=True)
    kept = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    module = base.trainable(positions="all", raw=True)
    taking = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert taking
    assert all(name.startswith("interventions.") for name in taking)
    assert type(module).__name__ == type(base.model).__name__
    assert isinstance(module, type(base.model))
    assert module.get_output_embeddings() is base.model.get_output_embeddings()
    assert "interventions" not in dict(base.model.named_children())
    sft(module, tokenizer, tmp_path, max_steps=2).train()
    assert base.generate(PROMPT, max_tokens=8, raw=True) == before
    assert base.model.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in base.model.state_dict().items())
    module.train()
    assert module.interventions.training
    assert not base.model.training
    other = base.trainable(
        positions="all", raw=True
    )  # the first is still there; each steers its own passes only
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        assert not torch.allclose(module(ids).logits, other(ids).logits)
        assert torch.equal(other(ids).logits, other(ids).logits)


@pytest.mark.parametrize("component", ["block", "attention"])
def test_activation_checkpointing_changes_no_gradient(base, component):
    module = base.trainable(positions="f2+l2+gen", component=component, raw=True)
    ids = torch.tensor([base.prompts.encode_raw(PROMPT)])
    labels = ids.clone()
    labels[:, :4] = -100
    gradients = []
    for options in (None, {}, {"every_n_layers": 2}):
        if options is not None:
            module.activation_checkpointing_enable(**options)
            assert module.is_gradient_checkpointing
        module.train().zero_grad()
        loss = module(input_ids=ids, labels=labels).loss
        module(input_ids=ids)  # another pass in between, as of a reference
        base.model(input_ids=ids)
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in module.interventions.parameters()])
    assert all(bool(gradient.any()) for gradient in gradients[0])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two)
    module.activation_checkpointing_disable()
    assert not module.is_activation_checkpointing
    with pytest.raises(ReftEdgeError, match="use_reentrant=False"):
        module.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ReftEdgeError, match="offload"):
        module.activation_checkpointing_enable(offload=True)


def test_a_batch_too_short_for_the_positions_has_gradients_of_zero(base):
    module = base.trainable(positions="f2+l2", raw=True).train()
    module(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[-100, 6, 7]])).loss.backward()
    assert not any(bool(parameter.grad.any()) for parameter in module.interventions.parameters())


def test_batches_that_do_not_tell_where_prompts_are_get_refused(base, tokenizer, tmp_path):
    module = base.trainable(positions="f2+l2", raw=True).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(ReftEdgeError, match="neither `labels` nor `prompt_lengths`"):
        module(input_ids=ids)
    with pytest.raises(ReftEdgeError, match="the labels leave no row a prompt"):
        module(input_ids=ids, labels=ids)
    with pytest.raises(ReftEdgeError, match="packing=False"):
        module(input_ids=ids, labels=ids, position_ids=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(ReftEdgeError, match="continuous batching"):
        module.generate_batch([[5, 6]])
    with pytest.raises(ReftEdgeError, match="packing=False"):
        sft(module, tokenizer, tmp_path, packing=True, max_length=64, max_steps=1).train()
    with pytest.raises(ReftEdgeError, match="completion"):
        sft(module, tokenizer, tmp_path, [{"text": PROMPT}], max_steps=1).train()
    with pytest.raises(ReftEdgeError, match="label smoothing"):
        hugging_face(module, tokenizer, tmp_path, label_smoothing_factor=0.1, max_steps=1).train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": "four"}, "rank is 'four'; expected a whole number"),
        ({"positions": "x9"}, "positions"),
        ({"layers": [0, 99]}, "99"),
        ({"intervention": "lora"}, "lora"),
        ({"dropout": 2}, "dropout is 2"),
        ({"adapter": "missing.safetensors"}, "missing.safetensors"),
    ],
)
def test_settings_that_do_not_go_are_named(base, given, message):
    with pytest.raises(ReftEdgeError, match=message):
        base.trainable(**given)


def test_what_cannot_be_trained_is_refused(base, device_folder, tmp_path):
    first = device_folder / "first.safetensors"
    with pytest.raises(ReftEdgeError, match="says what rank, raw is"):
        base.trainable(first, rank=2, raw=True)
    with pytest.raises(ReftEdgeError, match="is an encoder"):
        reft_edge.load(device_folder / "encoder-hf").trainable()
    with pytest.raises(BaseMismatchError):
        reft_edge.load(make_model(tmp_path / "other", seed=5)).trainable(first)
    with reft_edge.steered(base, first), pytest.raises(ReftEdgeError, match="steered already"):
        base.trainable()
    (tmp_path / "file").write_text("")
    with pytest.raises(ReftEdgeError, match="cannot make the folder"):
        base.trainable().save_pretrained(tmp_path / "file/folder")
    module = base.trainable()
    next(module.interventions.parameters()).data.fill_(float("nan"))
    with pytest.raises(ReftEdgeError, match="no longer finite"):
        module.save_pretrained(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_pushing_to_the_hub_uploads_the_adapter(base, tmp_path, monkeypatch):
    """All of transformers' own way there but the network."""
    pushed = {}
    made = SimpleNamespace(repo_id="me/captain")
    hub = SimpleNamespace(create_repo=lambda repo_id, **_: pushed.update(repo=repo_id) or made)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    module = base.trainable()
    monkeypatch.setattr(
        type(module),
        "_upload_modified_files",
        lambda self, folder, *_, **__: pushed.update(files=sorted(os.listdir(folder))),
        raising=False,
    )
    module.save_pretrained(tmp_path / "captain", push_to_hub=True)
    assert pushed == {"repo": "captain", "files": ["README.md", "adapter.safetensors"]}


@pytest.mark.parametrize("kind", ["RLOO", "KTO"])
def test_other_trainers_of_trl_take_it_too(base, tokenizer, tmp_path, kind):
    module = base.trainable(positions="f2+l2+gen", raw=True)
    before = {name: tensor.clone() for name, tensor in module.interventions.state_dict().items()}
    options = settings(tmp_path, max_steps=2, bf16=False)
    if kind == "KTO":
        rows = [{**row, "label": bool(i % 2)} for i, row in enumerate(ROWS)]
        given = {"ref_model": base.model, "args": trl.KTOConfig(**options)}
    else:
        rows = [{"prompt": row["prompt"]} for row in ROWS]
        lengths = {"num_generations": 4, "max_completion_length": 5}
        given = {
            "args": trl.RLOOConfig(**options, **lengths),
            "reward_funcs": lambda completion_ids, **_: [
                float(np.mean([token < 160 for token in ids])) for ids in completion_ids
            ],
        }
    train_dataset = datasets.Dataset.from_list(rows)
    trainer = getattr(trl, f"{kind}Trainer")(
        module, train_dataset=train_dataset, processing_class=tokenizer, **given
    )
    trainer.train()
    after = module.interventions.state_dict()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
