"""The clauses of dense captions: templates and the phrases that fill them. Each is true of every scene it is used for."""

from __future__ import annotations

SIZES = {
    "small": ("small", "little", "rather small"),
    "medium": ("medium-sized", "mid-sized"),
    "large": ("large", "big", "rather large"),
    "huge": ("huge", "very large", "enormous"),
}
PLACES = {
    ("top", "left"): ("in the top left corner", "in the upper left of the frame", "at the top left"),
    ("top", "middle"): ("at the top", "in the upper half of the frame", "near the top edge"),
    ("top", "right"): ("in the top right corner", "in the upper right of the frame", "at the top right"),
    ("middle", "left"): ("on the left", "in the left half of the frame", "on the left side"),
    ("middle", "middle"): ("in the middle", "in the center of the frame", "right at the center"),
    ("middle", "right"): ("on the right", "in the right half of the frame", "on the right side"),
    ("bottom", "left"): ("in the bottom left corner", "in the lower left of the frame", "at the bottom left"),
    ("bottom", "middle"): ("at the bottom", "in the lower half of the frame", "near the bottom edge"),
    ("bottom", "right"): ("in the bottom right corner", "in the lower right of the frame", "at the bottom right"),
}
OPEN_ONE = (
    "The picture shows {x}.",
    "There is exactly one object here, {x}.",
    "This is a picture of {x}.",
    "The only object in the scene is {x}.",
    "A single thing can be seen: {x}.",
    "The image is all about {x}.",
    "Here is {x}, alone in the frame.",
    "{x} is the only subject of this image.",
)
OPEN_LEFT = (
    "Two objects stand side by side: {x} and {y}.",
    "The picture shows two things next to each other, {x} and {y}.",
    "There are exactly two objects here, {x} and {y}.",
    "{x} and {y} share the frame, one beside the other.",
    "Side by side one sees {x} and {y}.",
    "The scene holds {x} and {y}, placed next to each other.",
    "The image is made of two parts, {x} and {y}.",
)
OPEN_ABOVE = (
    "Two objects are placed one above the other: {x} and {y}.",
    "The picture shows two things, {x} and {y}, one higher than the other.",
    "There are exactly two objects here, {x} and {y}.",
    "{x} and {y} are stacked in the frame with a gap between them.",
    "The scene holds {x} and {y}, arranged from top to bottom.",
    "The image is made of two parts, {x} and {y}.",
)
OPEN_COUNT = (
    "Exactly {n} are arranged {l}.",
    "The picture shows {n}, arranged {l}.",
    "There are {n} in this image, placed {l}.",
    "{n} can be seen, arranged {l}.",
    "This is a picture of {n}, set out {l}.",
    "The scene holds {n}, no more and no less, {l}.",
    "A group of {n} is laid out {l}.",
)
LAYOUTS = {
    2: ("side by side", "next to each other", "with one on the left and one on the right"),
    3: (
        "in a triangle with one at the top and two below",
        "with one above and two below",
        "in the shape of a small pyramid",
    ),
    4: ("in a square, two above and two below", "in two rows of two", "with one in each corner of the frame"),
    5: (
        "like the five dots of a die",
        "with one in the middle and one in each corner",
        "in a cross shape like on a die",
    ),
}
OPEN_ROW = (
    "Three different objects form a row from left to right: {x}, {y} and {z}.",
    "The picture shows three things side by side, {x}, {y} and {z}.",
    "From left to right there are {x}, {y} and {z}.",
    "{x}, {y} and {z} stand in a row.",
    "In a line from left to right one sees {x}, {y} and {z}.",
    "The scene holds three objects next to each other: {x}, {y} and {z}.",
)
OPEN_SIGN = (
    "The picture shows a sign.",
    "There is exactly one object here, a sign.",
    "This is a picture of a sign.",
    "The only object in the scene is a sign with rounded corners.",
    "A single thing can be seen: a sign.",
    "The image is all about a sign.",
)
OPEN_THING_SIGN = (
    "The picture shows {x} and a sign.",
    "There are exactly two things here, {x} and a sign.",
    "This is a picture of {x} with a sign.",
    "{x} and a sign share the frame.",
    "The scene holds {x} together with a sign.",
    "Two things can be seen: {x} and a sign.",
)
WHERE = (
    "The {x} is {p}.",
    "The {x} is placed {p}.",
    "The {x} can be found {p}.",
    "The {x} is shown {p}.",
    "{p} is the {x}.",
    "{p} one finds the {x}.",
    "The {x} appears {p}.",
)
LOOK = (
    "The {x} has {m}.",
    "The {x} is shown with {m}.",
    "One notices that the {x} has {m}.",
    "Up close, the {x} has {m}.",
    "The {x} is drawn with {m}.",
    "The {x} is painted with care and has {m}.",
)
LOOK_ALL = (
    "Every {x} has {m}.",
    "Each {x} is shown with {m}.",
    "Each {x} is drawn with {m}.",
    "Every single {x} has {m}.",
)
MATERIALS = (
    "a smooth surface",
    "soft shading",
    "smooth rounded edges",
    "gentle highlights",
    "a slightly glossy finish",
    "a clean and simple shape",
    "a polished look",
    "clear outlines",
    "the look of a shiny toy",
    "a soft shine",
)
SAME = (
    "{a} look the same.",
    "Every {x} has the same size and color.",
    "The {n} are equal in size, shape and color.",
    "Each {x} is a copy of the others.",
    "No {x} is larger than another.",
    "The {n} are alike in every way.",
)
SAME_COLOUR = ("{a} are {c}.", "Every {x} is {c}.", "Each {x} has the same {c} color.", "The {n} are {b} {c}.")
RELATIONS = {
    "left": ("to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "higher up than", "over"),
    "below": ("below", "beneath", "under"),
}
RELATED = (
    "The {x} is {r} the {y}.",
    "The {x} is placed {r} the {y}.",
    "The {x} can be seen {r} the {y}.",
    "One finds the {x} {r} the {y}.",
    "The {x} is clearly {r} the {y}.",
    "The {x} appears {r} the {y}.",
    "As for the layout, the {x} is {r} the {y}.",
    "Note that the {x} is {r} the {y}.",
)
BETWEEN = (
    "The {y} is between the {x} and the {z}.",
    "The {x} is on the left, the {y} in the middle and the {z} on the right.",
    "In the middle is the {y}, with the {x} on its left and the {z} on its right.",
    "The {y} stands between the {x} on the left and the {z} on the right.",
    "The {z} is on the right, the {x} is on the left and the {y} is between the two.",
    "First comes the {x}, then the {y}, and last the {z}.",
)
SIGN = (
    'The sign says "{t}" in {i} letters on a {p} board.',
    'The text "{t}" is written on the {p} sign in bold {i} letters.',
    'Bold {i} letters on the {p} sign read "{t}".',
    'On the {p} board of the sign the {i} text reads "{t}".',
    'The {p} sign has a {i} rim and says "{t}" in {i} letters.',
    'The {p} sign carries the text "{t}" in large {i} letters.',
)
BACKDROPS = {
    "grey": ("a plain grey wall", "a flat grey surface", "an even grey color", "a simple grey wall"),
    "pink": ("a plain pink wall", "a flat pink surface", "an even pink color", "a soft pink wall"),
    "mint": ("a plain mint wall", "a flat mint surface", "an even mint green color", "a pale mint wall"),
    "lavender": (
        "a plain lavender wall",
        "a flat lavender surface",
        "an even lavender color",
        "a pale lavender wall",
    ),
    "meadow": (
        "a green meadow under a clear blue sky",
        "a grassy field below a blue sky",
        "a lawn with bright green grass and a blue sky",
        "an open meadow on a clear day",
    ),
    "table": (
        "a wooden table by a cream wall",
        "a brown table top of wooden boards and a pale wall",
        "a room with a wooden desk and a cream wall",
        "a table made of wood beside a pale wall",
    ),
    "checker": (
        "a checkered wall of white and pale blue tiles",
        "a checkerboard pattern of pale tiles",
        "a tiled wall in white and pale blue",
        "a wall with a checkered pattern",
    ),
    "night": (
        "a dark night sky full of stars",
        "a deep blue night with tiny stars",
        "a starry sky at night",
        "a dark sky with many small stars",
    ),
    "beach": (
        "a sandy beach with a blue sea and a pale sky",
        "a calm sea behind yellow sand",
        "a seaside view with sand, water and sky",
        "a quiet beach by the sea",
    ),
    "sunset": (
        "a sunset sky that fades from purple to orange",
        "a glowing evening sky in purple and orange",
        "a warm sky at sunset",
        "an evening sky with the colors of a sunset",
    ),
    "brick": (
        "a wall of reddish brown bricks",
        "a brick wall with pale joints",
        "an old brick wall",
        "a wall made of bricks",
    ),
    "snow": (
        "a snowy field under a pale blue sky",
        "a winter landscape with snow and falling flakes",
        "a field of white snow below a winter sky",
        "a snowy winter scene",
    ),
}
BACKGROUND = (
    "The background is {b}.",
    "In the background there is {b}.",
    "Everything is set against {b}.",
    "The setting is {b}.",
    "{b} forms the background.",
    "{b} fills the rest of the picture.",
    "The backdrop is {b}.",
    "One sees {b} in the background.",
)
DAY = (
    "Bright daylight falls on the scene.",
    "The light is clear and bright like on a fine day.",
    "Natural daylight makes every color fresh.",
    "The scene is lit by soft daylight.",
    "Clear outdoor light fills the picture.",
    "It is daytime and the light is even.",
)
INSIDE = (
    "Soft even light fills the picture.",
    "The lighting is soft and comes from above.",
    "Gentle studio light falls on the scene.",
    "The light is calm and even.",
    "Soft lighting brings out every color.",
    "The scene is lit evenly from all sides.",
)
LIGHT = {
    "night": (
        "It is night, and the sky behind is dark.",
        "The night around is dark and quiet.",
        "Only the stars shine in the dark sky.",
        "The darkness makes every color glow.",
        "It is a clear night with many stars.",
        "Starlight fills the dark sky.",
    ),
    "sunset": (
        "Warm evening light fills the sky.",
        "The day is ending and the light is warm.",
        "The last light of the day colors the sky.",
        "The evening light is warm and soft.",
        "A warm glow lies over the scene.",
        "The light is golden and low.",
    ),
    **dict.fromkeys(("meadow", "beach", "snow"), DAY),
}
SHADOW = (
    "A soft shadow lies below {o}.",
    "{o} casts a soft shadow.",
    "There is a faint shadow under {o}.",
    "Below {o} one sees a gentle shadow.",
    "A small dark shadow grounds {o}.",
    "The shadow under {o} is soft.",
)
STYLE = (
    "The picture is drawn in a smooth 3D icon style.",
    "The style is that of glossy computer icons.",
    "The whole image is a clean digital drawing with soft shading.",
    "The drawing looks modern, round and friendly.",
    "The picture has the style of a colorful cartoon.",
    "The image looks like a cheerful drawing for children.",
)
MOOD = (
    "The mood is calm and friendly.",
    "The picture feels quiet and cheerful.",
    "The overall feeling is simple and playful.",
    "The atmosphere is peaceful and light.",
    "The scene has a happy and gentle mood.",
    "The whole image feels tidy and clear.",
    "The mood is relaxed and warm.",
)
CLOSING = (
    "Nothing else is in view.",
    "There is nothing else in the picture.",
    "No other object can be seen.",
    "The rest of the frame is empty.",
    "No other things appear in the scene.",
    "Nothing is cut off at the edges.",
    "Apart from that, the frame is empty.",
)


def texts() -> list[str]:
    """Every template and phrase, for the list of words."""
    groups = (
        *SIZES.values(), *PLACES.values(), OPEN_ONE, OPEN_LEFT, OPEN_ABOVE, OPEN_COUNT, *LAYOUTS.values(), OPEN_ROW,
        OPEN_SIGN, OPEN_THING_SIGN, WHERE, LOOK, LOOK_ALL, MATERIALS, SAME, SAME_COLOUR, *RELATIONS.values(), RELATED,
        BETWEEN, SIGN, *BACKDROPS.values(), BACKGROUND, DAY, INSIDE, *LIGHT.values(), SHADOW, STYLE, MOOD, CLOSING,
        ("each object both all",),
    )  # fmt: skip
    return [text for group in groups for text in group]
