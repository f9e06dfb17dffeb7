"""GenEval's rule on hand-made detections; the template judge: right on true renders, wrong on every kind of wrong picture."""

from dataclasses import replace

import numpy as np
import pytest

from train.data.small_world.backdrops import allowed, backdrop
from train.data.small_world.kinds import CORE, PALETTE
from train.data.small_world.scene import Thing
from train.data.small_world.sprites import artwork
from train.data.small_world.world import World
from train.evaluate import geneval, oracle
from train.evaluate.geneval import Asked, Detection, Want, judge, relations, voted_colour
from train.evaluate.mini_bench import scenes_of
from train.evaluate.template import judge as audit

FEW = CORE[:20]


def box(x, y, side=10):
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def test_relations_shrink_each_axis_and_divide_by_the_whole_offset():
    assert relations(box(10, 30), box(50, 30)) == {"left of"}
    assert relations(box(50, 30), box(10, 30)) == {"right of"}
    assert relations(box(30, 10), box(30, 50)) == {"above"}
    assert relations(box(10, 10), box(50, 50)) == {"left of", "above"}  # 38 / 56.6 on both axes
    assert relations(box(30, 30), box(31.9, 30)) == set()  # 0.1 * (10 + 10) = 2 pixels are no offset
    # (12, 10) shrinks to (10, 8) and is divided by 15.62: 0.640 and 0.512 count; (12, 9) gives 0.667 and 0.467
    assert relations(box(12, 10), box(0, 0)) == {"right of", "below"}
    assert relations(box(12, 9), box(0, 0)) == {"right of"}


def seen(kind, score=0.9, at=(30, 30), colour=None):
    return Detection(kind, score, box(*at), colour)


def test_include_takes_the_most_confident_and_fails_on_too_few():
    asked = Asked((Want("cat", 2),))
    assert judge(asked, [seen("cat"), seen("cat", 0.4)]).right
    assert not judge(asked, [seen("cat"), seen("cat", 0.3)]).right  # 0.3 itself does not pass
    assert not judge(asked, [seen("cat"), seen("dog")]).right
    red = Asked((Want("cat", 1, "red"),))
    assert judge(red, [seen("cat", 0.5, colour="blue"), seen("cat", 0.6, colour="red")]).right
    verdict = judge(red, [seen("cat", 0.7, colour="blue"), seen("cat", 0.6, colour="red")])
    assert (verdict.right, verdict.found, verdict.coloured) == (False, (True,), (False,))
    assert "red cat asked, blue seen" in verdict.reasons
    # of equally confident boxes the later one is taken
    assert judge(red, [seen("cat", colour="blue"), seen("cat", colour="red")]).right


def test_counting_means_exactly():
    asked = Asked((Want("cat", 3),), (("cat", 4),))
    assert judge(asked, [seen("cat")] * 3).right
    assert not judge(asked, [seen("cat")] * 2).right
    assert not judge(asked, [seen("cat")] * 4).right
    assert judge(asked, [seen("cat")] * 3 + [seen("cat", 0.2), seen("dog")]).right


def test_relation_must_hold_to_the_earlier_want():
    asked = Asked((Want("dog"), Want("cat", relation=("left of", 0))))
    assert judge(asked, [seen("cat", at=(10, 30)), seen("dog", at=(50, 30))]).right
    swapped = judge(asked, [seen("cat", at=(50, 30)), seen("dog", at=(10, 30))])
    assert (swapped.right, swapped.found) == (False, (True, True))
    assert not judge(asked, [seen("cat", at=(10, 30))]).right
    with pytest.raises(ValueError, match="earlier"):
        judge(Asked((Want("cat", relation=("left of", 0)),)), [seen("cat")])


def test_a_scene_asks_what_its_prompt_says():
    scene = World("held_out", {"position": 1.0}, CORE, "geneval").scene(5)
    asked = geneval.asked(scene)
    assert {w.kind for w in asked.include} == {t.kind for t in scene.things}
    assert asked.include[1].relation[1] == 0
    assert all(w.colour is None for w in asked.include)
    assert any(w.colour is not None for w in geneval.asked(scene, said=True).include)
    count = World("train", {"counting": 1.0}, CORE, "geneval").scene(5)
    many = geneval.asked(count)
    assert (many.include[0].count, many.exclude[0][1]) == (len(count.things), len(count.things) + 1)


def test_relation_rule_agrees_with_500_scenes():
    assert oracle.position_agreement(500) == (500, 500)  # scenes, not pictures


def test_colour_vote_by_arithmetic():
    right = of = 0
    for kind in ("apple", "car", "star", "teapot", "balloon"):
        for colour in PALETTE:
            art = artwork(kind, colour)
            picture = (255 * (art[..., :3] * art[..., 3:] + 0.7 * (1 - art[..., 3:]))).astype(np.uint8)
            right += voted_colour(picture, (0, 0, picture.shape[1], picture.shape[0]), PALETTE) == colour
            of += 1
    assert right >= 0.9 * of


@pytest.mark.parametrize(
    "task", ["single_object", "colors", "two_object", "position", "counting", "color_attr", "row", "text"]
)
def test_audit_takes_true_renders_and_refuses_others(task):
    world, scenes = World(), scenes_of(task, 3, FEW)
    pictures = [world.render(scene) for scene in scenes]
    for i, (scene, picture) in enumerate(zip(scenes, pictures)):
        verdict = audit(picture, scene, FEW)
        assert verdict.whole, (scene, verdict)
        assert verdict.background == scene.background
        other = scenes[i - 1]
        if {(t.kind, t.colour) for t in other.things} != {(t.kind, t.colour) for t in scene.things}:
            assert not audit(pictures[i - 1], scene, FEW).whole


def test_audit_does_not_know_where_the_scene_was_drawn():
    """Another seed's jitter and size, same request: still right. Blurred and noisy: still right."""
    world, scene = World(), scenes_of("colors", 1, FEW)[0]
    thing = scene.things[0]
    x0, y0, x1, y1 = thing.box
    small = replace(scene, things=(Thing(thing.kind, thing.colour, (x0 + 3, y0 + 2, x1 - 1, y1 - 2)),))
    picture = world.render(small).astype(np.float32)
    blurred = (picture + np.roll(picture, 1, 0) + np.roll(picture, 1, 1) + np.roll(picture, (1, 1), (0, 1))) / 4
    noise = np.random.default_rng(0).normal(0, 8, picture.shape)
    assert audit(np.clip(blurred + noise, 0, 255).astype(np.uint8), scene, FEW).whole


def test_audit_finds_each_fault():
    world = World()
    scene = next(
        s
        for s in scenes_of("color_attr", 20, FEW)
        if all(s.background in allowed(a.kind, b.colour) for a, b in (s.things, s.things[::-1]))
    )
    first, second = scene.things
    swapped = (Thing(first.kind, second.colour, first.box), Thing(second.kind, first.colour, second.box))
    verdict = audit(world.render(replace(scene, things=swapped)), scene, FEW)
    assert all(verdict.classes)
    assert not any(verdict.colours)
    missing = audit(world.render(replace(scene, things=scene.things[:1])), scene, FEW)
    assert missing.classes == (True, False)
    assert missing.things[1].kind is None
    # the prompt names two objects and no order: the other way round is right as well
    assert audit(world.render(scene), replace(scene, things=scene.things[::-1]), FEW).whole
    placed = scenes_of("position", 1, FEW)[0]
    assert not audit(world.render(placed), replace(placed, things=placed.things[::-1]), FEW).whole
    empty = backdrop(scene.background, 0, 64, 64).astype(np.uint8)
    assert not any(audit(empty, scene, FEW).classes)
    single = scenes_of("single_object", 1, FEW)[0]
    crowded = world.render(single).copy()
    crowded[2:20, 2:20] = (10, 200, 10)
    crowded[44:62, 2:20] = (200, 10, 200)
    assert not audit(crowded, single, FEW).clean
    sign = next(s for s in scenes_of("text", 20, FEW) if s.things)
    assert not audit(world.render(replace(sign, sign=None)), sign, FEW).whole
    with pytest.raises(ValueError, match="expected"):
        audit(empty[:32], scene, FEW)
    with pytest.raises(ValueError, match="asks for"):
        audit(empty, scene, [k for k in FEW if k != first.kind])
