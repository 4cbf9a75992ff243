# SPDX-License-Identifier: AGPL-3.0-or-later
"""Recipes: what is read, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from yolo_prune.errors import RecipeError
from yolo_prune.recipe import Recipe, bundled_names, json_schema, load_recipe


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_bundled_recipes_and_the_default() -> None:
    keeps = {name: load_recipe(name).target.keep for name in bundled_names()}
    assert keeps == {"half-flops": 0.5, "gentle": 0.75, "edge": 0.3}
    assert load_recipe() == load_recipe("half-flops")


def test_a_recipe_needs_no_more_than_a_target() -> None:
    recipe = load_recipe({"target": {"params": 0.4}})
    assert (recipe.target.metric, recipe.target.keep) == ("params", 0.4)
    assert (recipe.channels.round_to, recipe.recover.batchnorm, recipe.proof) == (8, 32, True)


@pytest.mark.parametrize("name", ["half-flops", "gentle", "edge"])
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, {"protect": ["model.0", "model.1*"], "criterion.norm": 1})
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(recipe) == recipe


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        ({"target.flops": 0.4}, "target", {"flops": 0.4}),
        ({"target.flops": "0.4"}, "target", {"flops": 0.4}),
        ({"target.params": 0.6}, "target", {"params": 0.6}),
        ({"criterion": "random"}, "criterion", {"name": "random"}),
        ({"criterion.name": "random", "criterion.seed": "3"}, "criterion", {"name": "random", "seed": 3}),
        ({"protect": "model.0"}, "protect", ["model.0"]),
        ({"protect": "[model.0, model.2*]"}, "protect", ["model.0", "model.2*"]),
        ({"schedule.rounds": "2", "schedule.curve": "linear"}, "schedule", {"rounds": 2, "curve": "linear"}),
        ({"proof": "false"}, "proof", False),
    ],
)
def test_overrides(overrides: dict[str, object], field: str, value: object) -> None:
    assert load_recipe("half-flops", overrides).to_dict()[field] == value


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("target: {flopz: 0.5}", ["target.flopz: unknown key; did you mean 'flops'?"]),
        ("target: {flops: 0.5}\nchanels: {min: 8}", ["chanels: unknown key; did you mean 'channels'?"]),
        ("target: {flops: 0.5}\nxyzzy: 1", ["xyzzy: unknown key; known are version, target"]),
        ("target: {flops: half}", ["target.flops", "valid number", "got 'half'"]),
        ("target: {flops: 1.5}", ["target.flops", "less than 1", "got 1.5", "fraction of the dense model"]),
        ("target: {flops: 0}", ["target.flops", "greater than 0"]),
        ("target: {flops: 0.5, params: 0.5}", ["target: give exactly one of flops and params"]),
        ("target: {}", ["target: give exactly one of flops and params"]),
        ("schedule: {rounds: 3}", ["target: is missing"]),
        ("target: {flops: 0.5}\nschedule: {rounds: 0}", ["schedule.rounds", "got 0"]),
        ("target: {flops: 0.5}\nschedule: {rounds: true}", ["schedule.rounds", "valid integer", "got True"]),
        ("target: {flops: 0.5}\nschedule: {rounds: 2, curve: one-shot}", ["curve one-shot is a single cut"]),
        (
            "target: {flops: 0.5}\nschedule: {curve: square}",
            ["'one-shot', 'linear' or 'cubic'", "got 'square'"],
        ),
        ("version: 2\ntarget: {flops: 0.5}", ["version", "got 2"]),
        ("target: {flops: 0.5}\nchannels: {max_removed: 1}", ["channels.max_removed", "less than 1"]),
        ("target: {flops: 0.5}\nrecover: {batchnorm: -1}", ["recover.batchnorm", "got -1"]),
        ("target: {flops: 0.5}\nproof: maybe", ["proof", "got 'maybe'"]),
        ("target: {flops: 0.5}\nprotect: [1]", ["protect.0", "valid string"]),
        ("target: {flops: 0.5}\ntarget: {flops: 0.4}", ["the key 'target' is given twice", "line 2"]),
        ("target: {flops: 0.5", ["is not valid YAML", "line 1"]),
        ("- flops\n- 0.5", ["must be a mapping", "found a list"]),
        ("", ["must be a mapping", "found an empty file"]),
        ("#" * 70_000, ["larger than 64 KiB"]),
        ("target: !!python/object/apply:os.system ['true']", ["is not valid YAML"]),
    ],
)
def test_bad_recipes_are_refused_with_the_place_and_the_remedy(text: str, fragments: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    for fragment in (*fragments, "mine.yaml"):
        assert fragment in str(error.value)


def test_every_problem_is_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, "target: {flops: 2}\nchannels: {min: 0, round: 4}\nproof: 1.5"))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "target.flops",
        "channels.min",
        "channels.round",
        "proof",
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "halfflops",
            "There is no recipe 'halfflops'. Did you mean 'half-flops'\\? Bundled are edge, gentle, half-flops",
        ),
        ("zzz", "There is no recipe 'zzz'. Bundled are"),
        ("nowhere/mine.yaml", "The recipe 'nowhere/mine.yaml' cannot be read: No such file"),
    ],
)
def test_recipes_that_are_not_there(source: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(source)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"target.flop": 0.4}, "target.flop: unknown key; did you mean 'flops'"),
        ({"shedule.rounds": 2}, "shedule: unknown key; did you mean 'schedule'"),
        ({"schedule.rounds.x": 2}, "schedule.rounds"),
        ({"protect": "[model.0"}, "recipe.protect=.model.0: the value is not valid YAML"),
    ],
)
def test_bad_overrides(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("half-flops", overrides)


def test_a_mapping_that_was_passed_is_not_changed() -> None:
    mine = {"target": {"flops": 0.5}}
    load_recipe(mine, {"target.flops": 0.3})
    assert mine == {"target": {"flops": 0.5}}


def test_the_schema_knows_every_field_and_forbids_others() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["target"]
    assert schema["properties"]["criterion"]["anyOf"][0]["type"] == "string"
    for part in ("Target", "Schedule", "Channels", "Recover"):
        for field in schema["$defs"][part]["properties"].values():
            assert field["description"]


def test_bundled_recipes_say_what_each_field_does() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    for path in folder.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert set(yaml.safe_load(text)) == set(Recipe.model_fields)
        assert all(
            "#" in line
            for line in text.splitlines()
            if line.strip() not in ("schedule:", "channels:", "recover:") and not line.startswith("version")
        )
