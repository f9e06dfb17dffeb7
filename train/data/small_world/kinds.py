"""What the small world is made of: classes with their words, and the ten colour words of GenEval.

A class is one picture of the vendored emoji set (`stem` = its code points, see vendor_emoji.py), one everyday noun in five
languages, and what may be painted. Two classes never share a noun or a synonym in any language.
"""

from __future__ import annotations

from dataclasses import dataclass

PALETTE = {  # word -> sRGB; brown is kept clearly darker than orange, which shading would else turn into it
    "red": (220, 32, 40),
    "orange": (250, 132, 20),
    "yellow": (250, 206, 40),
    "green": (40, 160, 60),
    "blue": (36, 104, 226),
    "purple": (128, 58, 190),
    "pink": (250, 120, 180),
    "brown": (122, 74, 40),
    "black": (44, 44, 50),
    "white": (236, 236, 242),
}
LANGUAGES = ("zh", "fr", "ja", "es")
GROUPS = {  # taxonomy word -> how one member is called without naming it
    "animal": "an animal",
    "fruit": "a piece of fruit",
    "vegetable": "a vegetable",
    "food": "something to eat",
    "plant": "a plant",
    "clothing": "a piece of clothing",
    "jewel": "a piece of jewellery",
    "vehicle": "a vehicle",
    "building": "a building",
    "furniture": "a piece of furniture",
    "tool": "a tool",
    "instrument": "a musical instrument",
    "toy": "a toy",
    "luggage": "a piece of luggage",
    "sky": "something from the sky",
    "symbol": "a symbol",
    "object": "an everyday object",
}


@dataclass(frozen=True)
class Kind:
    """One class of the world.

    `paint`: centre hue in turns of the part to recolour, "all", or None where the class is never recoloured.
    `natural`: the palette word that truly describes the unpainted picture, None where no single word does (a gold crown
    and a horse between brown and black have none: most of their pixels are nearer to another word).
    `also`: English synonyms, singular. `names`: zh, fr, ja, es -> the noun; `gender`: fr, es -> "m" or "f".
    """

    name: str
    noun: str
    plural: str
    natural: str | None
    paint: float | str | None
    also: tuple[str, ...]
    group: str
    names: dict[str, str]
    gender: dict[str, str]
    stem: str


def _kind(
    name: str,
    stem: str,
    group: str,
    natural: str | None,
    paint: float | str | None,
    words: str,
    *,
    noun: str | None = None,
    plural: str | None = None,
    also: str = "",
) -> Kind:
    """`words`: "zh | m or f, fr | ja | m or f, es"; `also`: comma-separated; the plural ends in -s unless given."""
    zh, fr, ja, es = (word.strip() for word in words.split("|"))
    genders = {"fr": fr[0], "es": es[0]}
    names = {"zh": zh, "fr": fr[2:], "ja": ja, "es": es[2:]}
    noun = noun or name
    synonyms = tuple(word.strip() for word in also.split(",") if word.strip())
    return Kind(name, noun, plural or noun + "s", natural, paint, synonyms, group, names, genders, stem)


_ALL = (
    # The first eighteen: their order, paint and pictures are what the shipped weights learned first.
    _kind("apple", "1f34e", "fruit", "red", 0.97, "苹果|f pomme|りんご|f manzana"),
    _kind("car", "1f697", "vehicle", "red", 0.97, "汽车|f voiture|車|m coche", also="automobile"),
    _kind("heart", "2764-fe0f", "symbol", "red", "all", "爱心|m cœur|ハート|m corazón"),
    _kind("star", "2b50", "symbol", "yellow", "all", "星星|f étoile|星|f estrella"),
    _kind("key", "1f511", "object", "yellow", "all", "钥匙|f clé|鍵|f llave"),
    _kind("book", "1f4d5", "object", "red", 0.95, "书|m livre|本|m libro"),
    _kind("umbrella", "2602-fe0f", "object", "purple", 0.75, "雨伞|m parapluie|傘|m paraguas"),
    _kind("fish", "1f41f", "animal", "blue", "all", "鱼|m poisson|魚|m pez", plural="fish"),
    _kind("shirt", "1f455", "clothing", "green", "all", "T恤|m t-shirt|Tシャツ|f camiseta", also="T-shirt"),
    _kind("balloon", "1f388", "toy", "red", 0.91, "气球|m ballon|風船|m globo"),
    _kind("bell", "1f514", "instrument", "yellow", "all", "铃铛|f cloche|ベル|f campana"),
    _kind("mushroom", "1f344", "food", "red", 0.97, "蘑菇|m champignon|きのこ|f seta"),
    _kind("teapot", "1fad6", "object", "red", "all", "茶壶|f théière|ティーポット|f tetera"),
    _kind("house", "1f3e0", "building", None, None, "房子|f maison|家|f casa"),
    _kind("tree", "1f333", "plant", "green", None, "树|m arbre|木|m árbol"),
    _kind("crown", "1f451", "jewel", None, None, "王冠|f couronne|王冠|f corona"),
    _kind("cactus", "1f335", "plant", "green", None, "仙人掌|m cactus|サボテン|m cactus", plural="cactuses"),
    _kind("penguin", "1f427", "animal", None, None, "企鹅|m pingouin|ペンギン|m pingüino"),
    # Recoloured as whole objects.
    _kind("anchor", "2693", "object", "blue", "all", "锚|f ancre|錨|f ancla"),
    _kind("backpack", "1f392", "luggage", "red", "all", "背包|m sac à dos|リュック|f mochila", also="rucksack"),
    _kind("bird", "1f426", "animal", "red", "all", "鸟|m oiseau|鳥|m pájaro"),
    _kind("bolt", "26a1", "sky", "orange", "all", "闪电|m éclair|稲妻|m rayo", noun="lightning bolt"),
    _kind("bone", "1f9b4", "object", "white", "all", "骨头|m os|骨|m hueso"),
    _kind("boot", "1f462", "clothing", "red", "all", "靴子|f botte|ブーツ|f bota"),
    _kind("bow", "1f380", "clothing", "red", "all", "蝴蝶结|m nœud|リボン|m lazo", also="ribbon"),
    _kind("bowl", "1f963", "object", "blue", "all", "碗|m bol|お椀|m cuenco"),
    _kind("bucket", "1faa3", "object", "blue", "all", "水桶|m seau|バケツ|m cubo", also="pail"),
    _kind("cap", "1f9e2", "clothing", "blue", "all", "鸭舌帽|f casquette|キャップ|f gorra", also="baseball cap"),
    _kind("chair", "1fa91", "furniture", "brown", "all", "椅子|f chaise|椅子|f silla"),
    _kind("cloud", "2601-fe0f", "sky", "white", "all", "云|m nuage|雲|f nube"),
    _kind("crab", "1f980", "animal", "red", "all", "螃蟹|m crabe|カニ|m cangrejo"),
    _kind("cup", "2615", "object", None, "all", "杯子|f tasse|カップ|f taza"),
    _kind("diamond", "1f48e", "jewel", "blue", "all", "钻石|m diamant|ダイヤモンド|m diamante", also="gem"),
    _kind("dinosaur", "1f995", "animal", "green", "all", "恐龙|m dinosaure|恐竜|m dinosaurio"),
    _kind("door", "1f6aa", "object", None, "all", "门|f porte|ドア|f puerta"),
    _kind("dress", "1f457", "clothing", "blue", "all", "连衣裙|f robe|ワンピース|m vestido", plural="dresses"),
    _kind("drop", "1f4a7", "symbol", "blue", "all", "水滴|f goutte|しずく|f gota", also="droplet"),
    _kind("eggplant", "1f346", "vegetable", "purple", "all", "茄子|f aubergine|ナス|f berenjena", also="aubergine"),
    _kind("elephant", "1f418", "animal", None, "all", "大象|m éléphant|ゾウ|m elefante"),
    _kind("envelope", "2709-fe0f", "object", "white", "all", "信封|f enveloppe|封筒|m sobre"),
    _kind("hat", "1f3a9", "clothing", "black", "all", "礼帽|m chapeau|帽子|m sombrero", also="top hat"),
    _kind("leaf", "1f341", "plant", "red", "all", "叶子|f feuille|葉|f hoja", plural="leaves", also="maple leaf"),
    _kind("lock", "1f512", "object", None, "all", "锁|m cadenas|錠|m candado", also="padlock"),
    _kind("magnet", "1f9f2", "tool", "red", 0.96, "磁铁|m aimant|磁石|m imán"),
    _kind("moon", "1f319", "sky", "yellow", "all", "月亮|f lune|月|f luna", also="crescent moon"),
    _kind("pear", "1f350", "fruit", "green", "all", "梨|f poire|洋梨|f pera"),
    _kind("pencil", "270f-fe0f", "tool", "orange", "all", "铅笔|m crayon|鉛筆|m lápiz"),
    _kind("pig", "1f416", "animal", "pink", "all", "猪|m cochon|豚|m cerdo"),
    _kind("puzzle", "1f9e9", "toy", "green", "all", "拼图|f pièce de puzzle|パズルのピース|f pieza de rompecabezas",
          noun="puzzle piece", also="jigsaw piece"),
    _kind("pushpin", "1f4cc", "tool", "red", "all", "图钉|f punaise|画びょう|f chincheta"),
    _kind("rabbit", "1f407", "animal", "white", "all", "兔子|m lapin|ウサギ|m conejo", also="bunny"),
    _kind("scarf", "1f9e3", "clothing", "red", "all", "围巾|f écharpe|マフラー|f bufanda", plural="scarves"),
    _kind("scooter", "1f6f5", "vehicle", "red", 0.96, "踏板摩托车|m scooter|スクーター|m escúter", also="motor scooter"),
    _kind("shell", "1f41a", "object", None, "all", "贝壳|m coquillage|貝殻|f concha", also="seashell"),
    _kind("shield", "1f6e1-fe0f", "object", "blue", "all", "盾牌|m bouclier|盾|m escudo"),
    _kind("snake", "1f40d", "animal", "green", "all", "蛇|m serpent|ヘビ|f serpiente"),
    _kind("snowflake", "2744-fe0f", "sky", "blue", "all", "雪花|m flocon de neige|雪の結晶|m copo de nieve"),
    _kind("suitcase", "1f9f3", "luggage", "blue", "all", "行李箱|f valise|スーツケース|f maleta"),
    _kind("swan", "1f9a2", "animal", "white", "all", "天鹅|m cygne|白鳥|m cisne"),
    _kind("teddy", "1f9f8", "toy", None, "all", "泰迪熊|m ours en peluche|テディベア|m osito de peluche",
          noun="teddy bear"),
    _kind("telephone", "260e-fe0f", "object", "red", "all", "电话|m téléphone|電話|m teléfono", also="phone"),
    _kind("tent", "26fa", "object", "green", "all", "帐篷|f tente|テント|f tienda de campaña"),
    _kind("tractor", "1f69c", "vehicle", "green", 0.41, "拖拉机|m tracteur|トラクター|m tractor"),
    _kind("trophy", "1f3c6", "object", None, "all", "奖杯|m trophée|トロフィー|m trofeo", plural="trophies"),
    _kind("tulip", "1f337", "plant", "pink", 0.9, "郁金香|f tulipe|チューリップ|m tulipán"),
    _kind("turtle", "1f422", "animal", "green", "all", "乌龟|f tortue|カメ|f tortuga"),
    _kind("whale", "1f433", "animal", "blue", "all", "鲸鱼|f baleine|クジラ|f ballena"),
    _kind("wrench", "1f527", "tool", None, "all", "扳手|f clé plate|レンチ|f llave inglesa", plural="wrenches",
          also="spanner"),
    # Drawn as they are.
    _kind("airplane", "2708-fe0f", "vehicle", None, None, "飞机|m avion|飛行機|m avión", also="plane, aeroplane"),
    _kind("banana", "1f34c", "fruit", "yellow", None, "香蕉|f banane|バナナ|m plátano"),
    _kind("basketball", "1f3c0", "toy", None, None, "篮球|m ballon de basket|バスケットボール|m balón de baloncesto"),
    _kind("bee", "1f41d", "animal", None, None, "蜜蜂|f abeille|ハチ|f abeja", also="honeybee"),
    _kind("bulb", "1f4a1", "object", "yellow", None, "灯泡|f ampoule|電球|f bombilla", noun="light bulb"),
    _kind("bus", "1f68c", "vehicle", None, None, "公交车|m bus|バス|m autobús", plural="buses"),
    _kind("butterfly", "1f98b", "animal", None, None, "蝴蝶|m papillon|蝶|f mariposa", plural="butterflies"),
    _kind("cake", "1f382", "food", None, None, "蛋糕|m gâteau|ケーキ|f tarta", also="birthday cake"),
    _kind("camera", "1f4f7", "object", None, None, "相机|m appareil photo|カメラ|f cámara"),
    _kind("carrot", "1f955", "vegetable", "orange", None, "胡萝卜|f carotte|ニンジン|f zanahoria"),
    _kind("castle", "1f3f0", "building", None, None, "城堡|m château|城|m castillo"),
    _kind("cat", "1f408", "animal", None, None, "猫|m chat|猫|m gato"),
    _kind("clock", "23f0", "object", None, None, "闹钟|m réveil|目覚まし時計|m despertador", noun="alarm clock"),
    _kind("corn", "1f33d", "vegetable", "yellow", None, "玉米|m épi de maïs|トウモロコシ|f mazorca", noun="corn cob"),
    _kind("croissant", "1f950", "food", None, None, "羊角面包|m croissant|クロワッサン|m cruasán"),
    _kind("doughnut", "1f369", "food", None, None, "甜甜圈|m beignet|ドーナツ|m dónut", also="donut"),
    _kind("drum", "1f941", "instrument", None, None, "鼓|m tambour|太鼓|m tambor"),
    _kind("flamingo", "1f9a9", "animal", "pink", None, "火烈鸟|m flamant|フラミンゴ|m flamenco"),
    _kind("giraffe", "1f992", "animal", None, None, "长颈鹿|f girafe|キリン|f jirafa"),
    _kind("grapes", "1f347", "fruit", "purple", None, "葡萄|f grappe de raisin|ぶどう|m racimo de uvas",
          noun="bunch of grapes", plural="bunches of grapes"),
    _kind("guitar", "1f3b8", "instrument", None, None, "吉他|f guitare|ギター|f guitarra", also="electric guitar"),
    _kind("hamburger", "1f354", "food", None, None, "汉堡|m hamburger|ハンバーガー|f hamburguesa", also="burger"),
    _kind("helicopter", "1f681", "vehicle", None, None, "直升机|m hélicoptère|ヘリコプター|m helicóptero"),
    _kind("horse", "1f40e", "animal", None, None, "马|m cheval|馬|m caballo"),
    _kind("hourglass", "231b", "object", None, None, "沙漏|m sablier|砂時計|m reloj de arena", plural="hourglasses"),
    _kind("icecream", "1f366", "food", None, None, "冰淇淋|f glace|ソフトクリーム|m helado", noun="ice cream",
          also="ice cream cone"),
    _kind("ladybug", "1f41e", "animal", None, None, "瓢虫|f coccinelle|てんとう虫|f mariquita", also="ladybird"),
    _kind("owl", "1f989", "animal", None, None, "猫头鹰|m hibou|フクロウ|m búho"),
    _kind("palm", "1f334", "plant", None, None, "棕榈树|m palmier|ヤシの木|f palmera", noun="palm tree"),
    _kind("pineapple", "1f34d", "fruit", None, None, "菠萝|m ananas|パイナップル|f piña"),
    _kind("pizza", "1f355", "food", None, None, "披萨|f part de pizza|ピザ|f porción de pizza", noun="pizza slice",
          also="slice of pizza"),
    _kind("rocket", "1f680", "vehicle", None, None, "火箭|f fusée|ロケット|m cohete"),
    _kind("snowman", "26c4", "object", "white", None, "雪人|m bonhomme de neige|雪だるま|m muñeco de nieve",
          plural="snowmen"),
    _kind("spider", "1f577-fe0f", "animal", "black", None, "蜘蛛|f araignée|クモ|f araña"),
    _kind("strawberry", "1f353", "fruit", None, None, "草莓|f fraise|イチゴ|f fresa", plural="strawberries"),
    _kind("sun", "2600-fe0f", "sky", None, None, "太阳|m soleil|太陽|m sol"),
    _kind("sunflower", "1f33b", "plant", "yellow", None, "向日葵|m tournesol|ヒマワリ|m girasol"),
    _kind("train", "1f682", "vehicle", None, None, "火车|m train|汽車|m tren", also="steam train"),
    _kind("watermelon", "1f349", "fruit", None, None, "西瓜|f tranche de pastèque|スイカ|f rodaja de sandía",
          noun="watermelon slice", also="slice of watermelon"),
)  # fmt: skip
KINDS = {kind.name: kind for kind in _ALL}
PAINTABLE = tuple(kind.name for kind in _ALL if kind.paint is not None)
CORE = (  # strong silhouettes at 64 pixels: what Lens-Mini learns when there is only a CPU; recolourable ones first
    *("apple", "car", "heart", "star", "key", "book", "umbrella", "fish", "shirt", "balloon", "bell", "mushroom"),
    *("teapot", "anchor", "boot", "bucket", "cap", "chair", "cup", "dress", "moon", "cloud", "pear", "bird"),
    *("leaf", "elephant", "whale", "lock", "house", "tree", "crown", "cactus", "penguin", "rocket", "banana", "carrot"),
)
