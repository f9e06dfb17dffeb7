"""Open wishes: short texts that name nothing of the world, and scenes of it that suit them.

A theme is a few wishes of one meaning, scenes for any of them, written as short captions of CORE's classes, and backdrops.
Of a wish in its phrasings one text in eight is kept from training: a word that it has never read tells so small a model nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

PHRASINGS = (
    "{w}",
    "{w}",
    "{w}, please",
    "a picture of {w}",
    "a photo of {w}",
    "draw {w}",
    "draw me {w}",
    "show me {w}",
    "I want {w}",
    "I would like {w}",
    "paint {w}",
    "an image of {w}",
    "a picture about {w}",
    "something for {w}",
)


@dataclass(frozen=True)
class Theme:
    """wishes: lower case, without a full stop. scenes: "three red balloons", "a fish above an anchor", "a pear and a cup"."""

    wishes: tuple[str, ...]
    scenes: tuple[str, ...]
    backdrops: tuple[str, ...]


def held_out_wish(wish: str) -> bool:
    """Whether a wish, as a text, is kept for evaluation: one in eight, by its words."""
    return hashlib.sha256(f"held-out wish {wish}".encode()).digest()[0] < 32


def _theme(wishes: str, scenes: str, backdrops: str) -> Theme:
    return Theme(*(tuple(part.strip() for part in text.split("|")) for text in (wishes, scenes, backdrops)))


THEMES = (
    # feasts and the year
    _theme("a birthday|a birthday party|a birthday card|my birthday|a party|a celebration|an anniversary|a children's party",
           "three red balloons|a red balloon and a crown", "pink|lavender"),
    _theme("christmas|a christmas card|christmas eve|a christmas morning|a christmas song|the holidays",
           "a yellow bell|a yellow bell and a red boot", "snow"),
    _theme("new year|new year's eve|a new year's party|fireworks|midnight on new year's eve",
           "a rocket and a yellow star|four yellow stars", "night"),
    _theme("valentine's day|love|a love letter|romance|a wedding|someone in love|a kiss|being in love",
           "a red heart|two red hearts", "pink"),
    _theme("easter|spring|a spring day|spring flowers|the first warm day|april",
           "a yellow bird and a tree|a yellow bird", "meadow"),
    _theme("halloween|a spooky night|a witch|something spooky|a haunted night|a ghost story",
           "an orange moon|a purple mushroom and an orange moon", "night"),
    _theme("winter|a winter day|a cold day|snow|frost|january|a snowy morning|ice and snow",
           "a penguin|a penguin and a tree", "snow"),
    _theme("summer|a summer day|a hot day|july|the summer holidays|a day in the sun|sunshine",
           "a blue bucket|a blue bucket and a red cap", "beach"),
    _theme("autumn|fall|october|an autumn day|a windy autumn day|falling leaves|november",
           "a red leaf|an orange leaf and a brown mushroom", "meadow"),
    _theme("harvest|the harvest|thanksgiving|a harvest festival|a farmers' market|a market stall",
           "a red apple and a green pear|a green pear and a red mushroom", "table"),
    _theme("a rainy day|rain|bad weather|a storm|a wet day|april showers|a day full of rain",
           "a blue umbrella|a white cloud above a blue umbrella", "lavender|mint"),
    # places
    _theme("something from the sea|the sea|the ocean|under the sea|an ocean animal|sea life|marine life|deep water",
           "a blue whale|a blue fish", "beach"),
    _theme("the beach|a day at the beach|a sandy beach|holidays by the sea|a trip to the seaside|seaside holidays",
           "a blue bucket|a yellow bucket and a red cap", "beach"),
    _theme("a gift for a sailor|a sailor|a ship|a boat|the navy|a pirate|a harbour|a captain|a sailing trip",
           "a blue anchor|an anchor and a blue fish", "beach"),
    _theme("fishing|a fishing trip|a fisherman|a river|a lake|an aquarium|a pond|a stream",
           "a blue fish|an orange fish and a blue bucket", "beach|mint"),
    _theme("the desert|a desert|a hot and dry place|mexico|the wild west|something thorny",
           "a cactus|two cactuses", "sunset|beach"),
    _theme("the forest|a forest|a walk in the woods|the woods|nature|hiking|a park",
           "a tree and a red mushroom|a tree", "meadow"),
    _theme("a garden|gardening|a gardener|flowers in a garden|a vegetable garden|growing things",
           "a carrot and a blue bucket|a blue bucket and a red mushroom", "meadow"),
    _theme("a farm|a farmer|life on a farm|the countryside|a village|country life", "a house|a house and a tree", "meadow"),
    _theme("a city|a street|traffic|a busy road|rush hour|a town", "a red car|a red car and a house", "grey"),
    _theme("a road trip|a long drive|driving|a journey|a race|fast driving|a racing driver|speed",
           "a red car|a blue car and a white cloud", "meadow"),
    _theme("africa|a safari|a zoo|a trip to the zoo|wild animals|the savanna|a big animal|the jungle",
           "a brown elephant|two brown elephants", "meadow|sunset"),
    _theme("the north pole|the south pole|antarctica|an iceberg|polar animals|a frozen land", "a penguin|two penguins", "snow"),
    _theme("a school|school|homework|the first day of school|a teacher|a lesson|studying|an exam",
           "a red book|a red book and a green apple", "table"),
    _theme("a library|reading|a good story|a novel|a quiet evening of reading|poetry|literature|a bookworm",
           "a blue book|three blue books", "table"),
    _theme("the office|work|a desk job|a meeting|monday morning|an office desk",
           "a red cup and a blue book|a blue book", "table|brick"),
    _theme("home|coming home|a family home|a new home|moving house|where I live|a home of my own",
           "a house|a house and a yellow key", "meadow"),
    _theme("a living room|furniture|a place to sit|a dining room|sitting down|a waiting room",
           "a brown chair|two brown chairs", "pink|mint"),
    # food and drink
    _theme("breakfast|a morning meal|good morning|a morning at home|brunch|an early morning",
           "a red cup and a banana|a red cup", "table"),
    _theme("coffee|a coffee break|a hot drink|cocoa|a cafe|an espresso|tired people", "a black cup|a red cup", "table"),
    _theme("tea time|afternoon tea|a tea party|my grandmother's kitchen|england|tea with friends",
           "a red teapot|a blue teapot", "table"),
    _theme("healthy food|a healthy snack|vitamins|a diet|fresh fruit|something healthy|a doctor's advice",
           "a red apple and a green pear|a red apple", "table"),
    _theme("something sweet|dessert|a fruit salad|a smoothie|a snack|something yellow to eat|a tropical fruit",
           "a banana and a green pear|a banana", "table"),
    _theme("lunch|dinner|supper|a meal|cooking|a soup|a kitchen|a recipe|a vegetarian dish",
           "a carrot and a red mushroom|a red mushroom and a carrot", "mint|checker"),
    _theme("a picnic|lunch in the park|eating outdoors|a picnic basket|a sunday picnic",
           "a red apple and a yellow cup|a red teapot and a tree", "meadow"),
    _theme("something for a rabbit|a rabbit's dinner|food for a horse|an orange vegetable|a root",
           "a carrot|three carrots", "meadow"),
    # sky and travel in space
    _theme("outer space|space|a space trip|an astronaut|a trip to the moon|science fiction|a galaxy|mars",
           "a rocket|a rocket and a yellow moon", "night"),
    _theme("the night|a quiet night|good night|bedtime|a lullaby|sleep|a dream|sweet dreams|insomnia",
           "a yellow moon|a yellow moon and a white cloud", "night"),
    _theme("the stars|a wish upon a star|astronomy|a telescope|the milky way|a sky full of lights",
           "three yellow stars|a yellow star", "night"),
    _theme("a sunset|the evening|an evening walk|the end of the day|dusk|twilight",
           "a black bird|a tree and a black bird", "sunset"),
    _theme("flying|freedom|the sky|a flight|wings|up in the air|a gentle breeze|the wind",
           "a blue bird|a white cloud above a red balloon|a red balloon", "meadow"),
    _theme("a song|music|a melody|singing|a choir|a songbird|a concert", "a yellow bell|a red bird", "lavender|pink"),
    _theme("a church|sunday|an alarm|the end of class|a doorbell|a loud sound", "a yellow bell|two yellow bells", "brick"),
    # people, clothes, jobs
    _theme("a king|a queen|royalty|a princess|a fairy tale|a castle|a ruler|the royal family|a knight",
           "a crown|a crown and a red heart", "lavender|brick"),
    _theme("winning|a champion|first prize|a winner|success|a medal|victory|the best",
           "a yellow star|a crown and a yellow star", "mint|pink"),
    _theme("fashion|an elegant evening|a ball|a lady|a dancer|a fashion show|going to a dance",
           "a red dress|a blue dress", "pink|lavender"),
    _theme("clothes|laundry|a wardrobe|getting dressed|shopping for clothes|a clothes shop",
           "a green shirt|a red cap and a blue dress", "mint|checker"),
    _theme("sport|a football game|a baseball player|a team|jogging|a summer camp|a coach",
           "a blue cap|a red shirt", "brick|mint"),
    _theme("a muddy walk|puddles|a cowboy|a long hike|a mountain tour|stamping in the mud",
           "a brown boot|two brown boots", "meadow"),
    _theme("cleaning|washing the floor|spring cleaning|a bath|housework|a mop|washing the car",
           "a blue bucket|a yellow bucket", "checker"),
    # things in the head
    _theme("a secret|security|safety|a password|a bank|something hidden|a safe place|privacy",
           "a yellow lock|a yellow lock and a red book", "brick"),
    _theme("a mystery|a puzzle|an answer|a solution|opening a door|a treasure|an escape room|curiosity",
           "a yellow key|a yellow key and a red heart", "brick|table"),
    _theme("magic|a magic forest|elves|a fairy|a wizard|an enchanted place|a spell",
           "a red mushroom|a red mushroom and a yellow star", "night"),
    _theme("friendship|a friend|a hug|kindness|thank you|a thank you card|get well soon|a gift for my mother|a present",
           "a red heart|a red heart and a yellow star", "mint|lavender"),
    _theme("luck|hope|a new beginning|optimism|joy|happiness|a good mood|something cheerful",
           "a yellow balloon|three yellow balloons", "mint|meadow"),
    _theme("sadness|a sad day|loneliness|a grey mood|melancholy|a farewell|tears", "a blue umbrella|a blue leaf", "grey"),
    _theme("peace|silence|calm|meditation|a quiet place|rest|patience", "a white bird|a white bird and a tree", "meadow"),
    _theme("childhood|toys|a toy shop|a playground|a nursery|a child's room|playing children",
           "a red balloon|a red balloon and a yellow star", "checker|pink"),
    _theme("strength|something heavy|a giant|something huge|a strong animal|a good memory",
           "a brown elephant", "sunset|meadow"),
    _theme("the future|technology|an invention|a science lesson|progress|a start-up", "a rocket", "night|lavender"),
    _theme("autumn soup|the forest floor|something poisonous|a gnome's house|after the rain",
           "a red mushroom|two red mushrooms", "meadow"),
    _theme("a pet|an animal|a small animal|something with feathers|a gift for a bird watcher|a nest",
           "a red bird|a yellow bird and a tree", "meadow"),
)  # fmt: skip
