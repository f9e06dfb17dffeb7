"""Brief captions in Chinese, French, Japanese and Spanish: nouns from `kinds`, colour words that agree, true backgrounds."""

from __future__ import annotations

import random

from .kinds import KINDS
from .scene import Scene, Thing

LANGUAGES = ("zh", "fr", "ja", "es")
TASKS = ("single_object", "colors", "two_object", "color_attr")

# What stands before the noun (zh, ja) or after it (fr, es: masculine, feminine).
COLOURS: dict[str, dict[str, tuple[str, ...]]] = {
    "zh": {
        "red": ("红色的",),
        "orange": ("橙色的",),
        "yellow": ("黄色的",),
        "green": ("绿色的",),
        "blue": ("蓝色的",),
        "purple": ("紫色的",),
        "pink": ("粉色的",),
        "brown": ("棕色的",),
        "black": ("黑色的",),
        "white": ("白色的",),
    },
    "ja": {
        "red": ("赤い",),
        "orange": ("オレンジ色の",),
        "yellow": ("黄色い",),
        "green": ("緑色の",),
        "blue": ("青い",),
        "purple": ("紫色の",),
        "pink": ("ピンク色の",),
        "brown": ("茶色い",),
        "black": ("黒い",),
        "white": ("白い",),
    },
    "fr": {
        "red": ("rouge", "rouge"),
        "orange": ("orange", "orange"),
        "yellow": ("jaune", "jaune"),
        "green": ("vert", "verte"),
        "blue": ("bleu", "bleue"),
        "purple": ("violet", "violette"),
        "pink": ("rose", "rose"),
        "brown": ("marron", "marron"),
        "black": ("noir", "noire"),
        "white": ("blanc", "blanche"),
    },
    "es": {
        "red": ("rojo", "roja"),
        "orange": ("naranja", "naranja"),
        "yellow": ("amarillo", "amarilla"),
        "green": ("verde", "verde"),
        "blue": ("azul", "azul"),
        "purple": ("morado", "morada"),
        "pink": ("rosa", "rosa"),
        "brown": ("marrón", "marrón"),
        "black": ("negro", "negra"),
        "white": ("blanco", "blanca"),
    },
}
STRESSED_A = ("águila", "hacha", "ancla", "arpa", "ala", "arma", "ave", "aula", "ánfora")  # feminine, yet "un"

ONE = {
    "zh": ("一张{x}的照片", "{x}", "图中有{x}", "一幅{x}的图画", "画面中央是{x}"),
    "fr": ("une photo d'{x}", "{x}", "on voit {x}", "une image d'{x}", "{x} au milieu de l'image"),
    "ja": ("{x}の写真", "{x}", "{x}があります", "{x}の絵", "真ん中に{x}があります"),
    "es": ("una foto de {x}", "{x}", "se ve {x}", "una imagen de {x}", "{x} en el centro de la imagen"),
}
TWO = {
    "zh": ("一张{x}和{y}的照片", "{x}和{y}", "图中有{x}和{y}", "左边是{x}，右边是{y}", "{x}在{y}的左边"),
    "fr": (
        "une photo d'{x} et d'{y}",
        "{x} et {y}",
        "on voit {x} et {y}",
        "{x} à gauche et {y} à droite",
        "{x} à gauche d'{y}",
    ),
    "ja": ("{x}と{y}の写真", "{x}と{y}", "{x}と{y}があります", "左に{x}、右に{y}", "{y}の左に{x}があります"),
    "es": (
        "una foto de {x} y {y}",
        "{x} y {y}",
        "se ven {x} y {y}",
        "{x} a la izquierda y {y} a la derecha",
        "{x} a la izquierda de {y}",
    ),
}
ABOVE = {
    "zh": ("{x}在{y}的上面", "上面是{x}，下面是{y}", "{y}在{x}的下面"),
    "fr": ("{x} au-dessus d'{y}", "{x} en haut et {y} en bas", "{y} sous {x}"),
    "ja": ("{y}の上に{x}があります", "上に{x}、下に{y}", "{x}の下に{y}があります"),
    "es": ("{x} encima de {y}", "{x} arriba y {y} abajo", "{y} debajo de {x}"),
}
BEHIND = {
    "zh": {
        "grey": ("灰色背景", "灰色的墙前"),
        "pink": ("粉色背景", "粉色的墙前"),
        "mint": ("薄荷绿背景", "薄荷绿的墙前"),
        "lavender": ("淡紫色背景", "淡紫色的墙前"),
        "meadow": ("蓝天下的草地上", "在草地上"),
        "table": ("在木桌上", "木桌和米色的墙"),
        "checker": ("格子墙前", "格子背景"),
        "night": ("在星空下", "夜空背景"),
        "beach": ("在海滩上", "海边的沙滩上"),
        "sunset": ("在夕阳下", "夕阳背景"),
        "brick": ("在砖墙前", "砖墙背景"),
        "snow": ("在雪地里", "在雪中"),
    },
    "fr": {
        "grey": ("sur un fond gris", "devant un mur gris"),
        "pink": ("sur un fond rose", "devant un mur rose"),
        "mint": ("sur un fond vert menthe", "devant un mur vert menthe"),
        "lavender": ("sur un fond lavande", "devant un mur lavande"),
        "meadow": ("dans un pré sous un ciel bleu", "sur l'herbe"),
        "table": ("sur une table en bois", "sur une table devant un mur crème"),
        "checker": ("devant un mur à carreaux", "sur un fond à carreaux"),
        "night": ("sous un ciel étoilé", "dans la nuit étoilée"),
        "beach": ("sur la plage", "au bord de la mer"),
        "sunset": ("au coucher du soleil", "devant un ciel du soir"),
        "brick": ("devant un mur de briques", "sur un fond de briques"),
        "snow": ("dans la neige", "sous la neige en hiver"),
    },
    "ja": {
        "grey": ("灰色の背景", "灰色の壁の前"),
        "pink": ("ピンク色の背景", "ピンク色の壁の前"),
        "mint": ("ミント色の背景", "ミント色の壁の前"),
        "lavender": ("薄紫色の背景", "薄紫色の壁の前"),
        "meadow": ("青空の下の草原", "草の上"),
        "table": ("木のテーブルの上", "木の机の上"),
        "checker": ("格子模様の壁の前", "格子模様の背景"),
        "night": ("星空の下", "夜空の背景"),
        "beach": ("海辺", "砂浜"),
        "sunset": ("夕焼けの空", "夕日の背景"),
        "brick": ("れんがの壁の前", "れんがの背景"),
        "snow": ("雪の中", "雪の上"),
    },
    "es": {
        "grey": ("sobre un fondo gris", "delante de una pared gris"),
        "pink": ("sobre un fondo rosa", "delante de una pared rosa"),
        "mint": ("sobre un fondo verde menta", "delante de una pared verde menta"),
        "lavender": ("sobre un fondo lavanda", "delante de una pared lavanda"),
        "meadow": ("en un prado bajo el cielo azul", "sobre la hierba"),
        "table": ("sobre una mesa de madera", "en una mesa delante de una pared crema"),
        "checker": ("delante de una pared de cuadros", "sobre un fondo de cuadros"),
        "night": ("bajo un cielo estrellado", "en la noche estrellada"),
        "beach": ("en la playa", "a la orilla del mar"),
        "sunset": ("al atardecer", "con el cielo de la tarde"),
        "brick": ("delante de un muro de ladrillos", "sobre un fondo de ladrillos"),
        "snow": ("en la nieve", "en un paisaje nevado"),
    },
}


def phrase(thing: Thing, language: str, said: str | None) -> str:
    """Article (fr, es) and noun of a thing with the colour that is said, if any, agreeing in gender."""
    kind = KINDS[thing.kind]
    noun = kind.names[language]
    if language in ("zh", "ja"):
        return (COLOURS[language][said][0] if said else "") + noun
    feminine = kind.gender[language] == "f"
    article = "une" if feminine and language == "fr" else "una" if feminine else "un"
    if language == "es" and noun.split()[0] in STRESSED_A:
        article = "un"
    colour = f" {COLOURS[language][said][feminine]}" if said else ""
    return f"{article} {noun}{colour}"


def caption(scene: Scene, rng: random.Random, language: str, colour_words: float) -> str:
    """A true brief caption; `colour_words` is how often a natural colour is said."""
    phrases = []
    for thing in scene.things:
        natural = thing.colour == KINDS[thing.kind].natural
        say = thing.colour is not None and (not natural or rng.random() < colour_words)
        phrases.append(phrase(thing, language, thing.colour if say else None))
    templates = ONE if len(phrases) == 1 else ABOVE if scene.relation == "above" else TWO
    template = rng.choice(templates[language])
    for letter, thing in zip("xy", scene.things):
        if KINDS[thing.kind].group == "animal":  # Japanese has another verb for what lives
            template = template.replace("{" + letter + "}があります", "{" + letter + "}がいます")
    text = template.format(**dict(zip("xy", phrases)))
    stop, comma = ("。", "，" if language == "zh" else "、") if language in ("zh", "ja") else (".", ", ")
    if rng.random() < 0.7:
        text = text + comma + rng.choice(BEHIND[language][scene.background])
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:] + stop
    return text


def words() -> set[str]:
    """French and Spanish words; Chinese and Japanese nouns, colour words and the pieces between them."""
    out: set[str] = set()
    for language in LANGUAGES:
        pieces = [noun.names[language] for noun in KINDS.values()]
        pieces += [form for forms in COLOURS[language].values() for form in forms]
        pieces += [p for group in BEHIND[language].values() for p in group]
        for template in (*ONE[language], *TWO[language], *ABOVE[language]):
            pieces += template.replace("{x}", "\0").replace("{y}", "\0").split("\0")
        if language in ("zh", "ja"):
            out |= {piece for piece in pieces if piece}
        else:
            out |= {word.strip(",.") for piece in pieces for word in piece.split()}
    out |= {"un", "une", "una", "d'un", "d'une", "がいます", "，", "、", "。"}
    return {word for word in out if word}
