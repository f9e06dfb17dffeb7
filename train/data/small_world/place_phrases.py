"""What captions say of a photographed place: clauses, dense phrases, its light, and what is true of such a picture."""

from __future__ import annotations

CLAUSES = {  # after a short caption
    "apartment": (
        "in an empty apartment",
        "in a bright empty room",
        "inside an unfurnished flat",
        "in an empty living room",
        "in a room with a parquet floor",
        "in an apartment with cream walls",
    ),
    "ballroom": (
        "in a ballroom",
        "in a grand ballroom",
        "in an empty dance hall",
        "on the parquet of a ballroom",
        "inside a festive hall",
        "in a hall with chandeliers",
    ),
    "city": (
        "in a city street",
        "on a wide street in the city",
        "in a modern city",
        "among tall city buildings",
        "in front of office towers",
        "on a boulevard between high-rise buildings",
    ),
    "desert": (
        "in the desert at dawn",
        "in a rocky desert at dawn",
        "in desert hills before sunrise",
        "on desert rocks in the early morning",
        "in a barren landscape at daybreak",
        "in front of desert mountains at dawn",
    ),
    "field": (
        "in a misty field at sunrise",
        "in a field in the morning mist",
        "in the countryside on a misty morning",
        "in a foggy field in the morning",
        "on open farmland at sunrise",
        "in a field in the morning light",
    ),
    "forest": (
        "in a forest",
        "in the woods",
        "in a sunlit forest",
        "among the trunks of a forest",
        "on the forest floor",
        "in a pine forest",
    ),
    "harbor": (
        "in a harbor at dusk",
        "by the harbor in the evening",
        "on a stone quay at dusk",
        "at a quiet waterfront at nightfall",
        "on the shore of a lagoon at dusk",
        "at a quiet harbor",
    ),
    "lake": (
        "by a calm lake",
        "in front of a calm lake",
        "by a still lake and a cloudy sky",
        "at a lake that mirrors the sky",
        "by a lake as smooth as a mirror",
        "at a wide lake on a fine day",
    ),
    "lobby": (
        "in a lobby",
        "in the lobby of an office",
        "in a modern foyer",
        "in an entrance hall",
        "inside a public building",
        "in a lobby with a parquet floor",
    ),
    "park": (
        "in a park",
        "on the lawn of a park",
        "on a wide lawn in a park",
        "in a public park on a fine day",
        "in a sunny park",
        "in a park with freshly cut grass",
    ),
    "savanna": (
        "in the savanna at night",
        "in an African savanna at night",
        "in the bush at night",
        "on a dark African plain",
        "on a dry plain at night",
        "in the savanna in the dark",
    ),
    "square": (
        "on a square in Venice",
        "in an old Italian square",
        "on a wide stone square in the evening",
        "in a historic town square",
        "on an Italian piazza",
        "on a piazza in the evening",
    ),
    "walkway": (
        "in a glass walkway",
        "in a covered footbridge",
        "inside a bridge with glass walls",
        "in a corridor of glass and steel",
        "on an indoor footbridge",
        "in a long glass passage",
    ),
    "warehouse": (
        "in a warehouse",
        "in an empty warehouse",
        "inside an old factory hall",
        "in an abandoned warehouse",
        "in a storage hall",
        "on the concrete floor of a warehouse",
    ),
}
BACKDROPS = {  # in a sentence of dense_phrases.BACKGROUND
    "apartment": (
        "an empty apartment with cream walls and a parquet floor",
        "a photograph of a bright, unfurnished room",
        "the inside of an empty flat",
        "a real living room without furniture",
    ),
    "ballroom": (
        "a ballroom with a dark ceiling, chandeliers and a patterned parquet floor",
        "a photograph of an empty dance hall",
        "the inside of a grand ballroom",
        "a real ballroom with a shining floor",
    ),
    "city": (
        "a wide city street between tall office buildings",
        "a photograph of a modern city under an overcast sky",
        "a downtown boulevard with towers of glass and stone",
        "a real city street on a cloudy day",
    ),
    "desert": (
        "a rocky desert with distant mountains at dawn",
        "a photograph of desert hills before sunrise",
        "a barren landscape of rocks and hills at daybreak",
        "a real desert under a pale morning sky",
    ),
    "field": (
        "a misty field at sunrise",
        "a photograph of farmland in the morning mist",
        "open countryside on a foggy morning",
        "a real field with long grass in the early morning light",
    ),
    "forest": (
        "a sunlit forest with tall trunks and mossy ground",
        "a photograph of the woods on a sunny day",
        "a pine forest with rocks and ferns",
        "a real forest with light falling between the trunks",
    ),
    "harbor": (
        "a quiet harbor with a stone quay at dusk",
        "a photograph of a waterfront at nightfall",
        "the shore of a lagoon in the evening",
        "a real harbor under a darkening sky",
    ),
    "lake": (
        "a calm lake that mirrors a cloudy sky",
        "a photograph of still water on a fine day",
        "a wide lake as smooth as a mirror",
        "a real lake on a bright day",
    ),
    "lobby": (
        "a modern lobby with a parquet floor and ceiling lamps",
        "a photograph of the entrance hall of an office",
        "the inside of a public building with a wide foyer",
        "a real lobby with benches and bright walls",
    ),
    "park": (
        "a park with a wide lawn under a clear sky",
        "a photograph of a public park on a sunny day",
        "the freshly cut grass of a wide park",
        "a real park with a row of shrubs on the horizon",
    ),
    "savanna": (
        "an African savanna at night",
        "a photograph of a dry plain at night",
        "the bush at night with a faint glow on the horizon",
        "a real savanna in the dark of night",
    ),
    "square": (
        "a wide stone square in Venice in the evening",
        "a photograph of an Italian piazza",
        "an old town square paved with stone",
        "a real piazza at the end of the day",
    ),
    "walkway": (
        "a covered footbridge with walls of glass and steel",
        "a photograph of a long glass walkway",
        "the inside of a footbridge with a shining floor",
        "a real corridor of glass with a city outside",
    ),
    "warehouse": (
        "an empty warehouse with a concrete floor and ceiling lamps",
        "a photograph of an old factory hall",
        "the inside of an abandoned warehouse",
        "a real storage hall with metal walls",
    ),
}
_ROOM = (
    "Soft indoor light fills the picture.",
    "The light is that of a bright interior.",
    "Lamps and windows light the room from several sides.",
    "The indoor light is calm and even.",
)
_DAY = (
    "Bright daylight falls on the place.",
    "The light is clear and bright like on a summer day.",
    "Natural daylight fills the scene.",
    "It is daytime and the place is well lit.",
)
_MORNING = (
    "The first light of the day lies over the land.",
    "The light of the early morning is soft.",
    "It is early in the morning and the light is mild.",
    "The morning light comes in low.",
)
_EVENING = (
    "The light of the evening is fading.",
    "It is evening and the light is soft.",
    "The last daylight lies over the place.",
    "Dim evening light falls on the scene.",
)
LIGHT = {
    **dict.fromkeys(("apartment", "ballroom", "lobby", "walkway", "warehouse"), _ROOM),
    **dict.fromkeys(("forest", "lake", "park"), _DAY),
    **dict.fromkeys(("desert", "field"), _MORNING),
    **dict.fromkeys(("harbor", "square"), _EVENING),
    "city": (
        "The sky is overcast and the light is even.",
        "The light of a cloudy day is soft and pale.",
        "It is a dull day without hard shadows.",
        "Pale daylight comes through the overcast sky.",
    ),
    "savanna": (
        "It is night and the land lies in the dark.",
        "Only a faint glow lights the horizon.",
        "The ground lies in the darkness of the night.",
        "Little light is left at this hour.",
    ),
}
STYLE = (  # what is in front stays drawn
    "Glossy 3D icons are set before a real photograph.",
    "The picture joins a smooth digital drawing with a photograph.",
    "The place is photographed, what stands before it is drawn.",
    "The background is a soft photograph and the rest looks like a shiny toy.",
    "The whole image is a collage of drawing and photography.",
    "The photograph behind is slightly out of focus.",
)
CLOSING = (
    "The place itself is empty and still.",
    "Nobody is to be seen.",
    "There are no people in the picture.",
    "Behind that the place lies quiet.",
    "The place behind is soft and a little blurred.",
    "Nothing is cut off at the edges.",
)


def texts() -> list[str]:
    """Every phrase, for the list of words."""
    return [
        text for group in (*CLAUSES.values(), *BACKDROPS.values(), *LIGHT.values(), STYLE, CLOSING) for text in group
    ]
