# SPDX-License-Identifier: AGPL-3.0-or-later
"""The pruning record: plain data that travels in a checkpoint and is refused when it cannot be trusted."""

from __future__ import annotations

import io
import json
import pickletools
from copy import deepcopy
from typing import Any

import models
import pytest
import torch
import yaml

from yolo_prune.cut.record import KEY, Record, RoundFacts, is_pruned, read_record, write_record
from yolo_prune.errors import PruneError


def record() -> Record:
    plan = models.plan_of("yolo26-tiny", target_flops=0.6)
    rounds = (RoundFacts(1, plan.hash, epoch=0, target={"flops": 0.6}),)
    return Record(models.recipe(target_flops=0.6).to_dict(), plan, models.graph_of("yolo26-tiny").widths, rounds, 0.9)


@pytest.mark.parametrize(
    "wanted", [Record({}), Record({"a": 1}, rounds=(RoundFacts(1, "a", held=False),), start=0.5), None]
)
def test_a_record_comes_back_as_it_was_written(wanted: Record | None) -> None:
    model = models.build("yolo26-tiny") if wanted else models.pruned("yolo26-tiny", target_flops=0.6)
    wanted = wanted or record()
    stock = {k: v for k, v in deepcopy(model.yaml).items() if k != KEY}
    write_record(model, wanted)
    assert read_record(model) == wanted
    assert {k: v for k, v in model.yaml.items() if k != KEY} == stock


def test_the_record_is_plain_data() -> None:
    model = models.build("yolo26-tiny")
    write_record(model, record())
    data = model.yaml[KEY]
    assert json.loads(json.dumps(data)) == data
    assert yaml.safe_load(yaml.safe_dump(data)) == data


def test_a_record_survives_a_checkpoint_that_holds_only_stock_classes() -> None:
    model = models.pruned("yolo26-tiny", target_flops=0.6)
    write_record(model, record())
    buffer = io.BytesIO()
    torch.save({"model": model}, buffer, _use_new_zipfile_serialization=False)
    names: set[str] = set()
    stream = io.BytesIO(buffer.getvalue())
    while stream.tell() < len(buffer.getvalue()):
        try:
            operations = list(pickletools.genops(stream))
        except ValueError:
            break  # behind the pickles lie the tensors' bytes
        names |= {str(argument) for op, argument, _ in operations if op.name == "GLOBAL"}
    assert any(name.startswith("ultralytics.nn.tasks") for name in names)
    assert not [name for name in names if "prune" in name]
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)["model"]
    assert read_record(loaded) == record()
    assert is_pruned(loaded)


def test_writing_leaves_other_models_of_the_same_configuration_alone() -> None:
    model = models.build("yolo26-tiny")
    other = models.build("yolo26-tiny")
    other.yaml = model.yaml
    write_record(model, record())
    assert read_record(other) is None


def test_a_model_is_pruned_once_something_was_removed() -> None:
    model = models.build("yolo26-tiny")
    assert not is_pruned(model)
    assert read_record(model) is None
    write_record(model, Record({}))
    assert not is_pruned(model)
    write_record(model, record())  # what a stock trainer leaves: the record of a structure that grew back
    assert not is_pruned(model)
    thin = models.pruned("yolo26-tiny", target_flops=0.6)
    write_record(thin, record())
    assert is_pruned(thin)


@pytest.mark.parametrize("configuration", [None, "yolo26.yaml", 3])
def test_a_model_without_a_configuration_has_no_record(configuration: Any) -> None:
    model = models.build("yolo26-tiny")
    model.yaml = configuration
    assert read_record(model) is None
    assert not is_pruned(torch.nn.ReLU())


def changed(change: Any) -> Any:
    model = models.build("yolo26-tiny")
    write_record(model, record())
    model.yaml = deepcopy(model.yaml)
    change(model.yaml)
    return model


def test_a_later_version_is_refused_with_what_to_install() -> None:
    model = changed(lambda y: y[KEY].update(version=2, yolo_prune="7.1"))
    with pytest.raises(PruneError, match=r"record has version 2; yolo-prune \S+ reads version 1\. Install .*\(7\.1\)"):
        read_record(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.update({KEY: "yes"}),
        lambda y: y.update({KEY: 3}),
        lambda y: y.update({KEY: []}),
        lambda y: y.update({KEY: {}}),
        lambda y: y[KEY].pop("version"),
        lambda y: y[KEY].pop("recipe"),
        lambda y: y[KEY].pop("plan"),
        lambda y: y[KEY].update(recipe=None),
        lambda y: y[KEY].update(widths=None),
        lambda y: y[KEY].update(widths=["model.0"]),
        lambda y: y[KEY].update(widths={"model.0": None}),
        lambda y: y[KEY].update(rounds=3),
        lambda y: y[KEY].update(rounds=[3]),
        lambda y: y[KEY].update(rounds=[{"number": 1}]),
        lambda y: y[KEY].update(rounds=[{"number": 1, "plan": None}]),
        lambda y: y[KEY].update(start="half"),
        lambda y: y[KEY].update(plan=[1]),
        lambda y: y[KEY]["plan"].pop("keep"),
        lambda y: y[KEY]["plan"].update(version=9),
        lambda y: y[KEY]["plan"]["shapes"].clear(),
    ],
)
def test_a_damaged_record_is_refused_as_such(change: Any) -> None:
    with pytest.raises(PruneError, match="This checkpoint's pruning record is damaged: "):
        is_pruned(changed(change))
