"""Word tables for the skills."""

from __future__ import annotations

NAMES = (
    "Ada Ben Cora Dan Ella Finn Greta Hugo Iris Jack Kira Leo Mia Noah Olga Paul Rosa Sam Tess Uma "
    "Vera Will Zoe Anna Boris Clara Emil Flora Gus Hanna Ivan Julia Karl Lena Max Nina Oscar Pia "
    "Ralf Sara Theo Ursula Viktor Wanda Yara Alma Bruno Carla Dora Edgar"
).split()
COLOURS = "red blue green yellow white black brown pink purple orange grey golden silver".split()
ADJECTIVES = [
    *COLOURS,
    *"old new big small round flat tall wooden iron glass broken shiny heavy soft".split(),
]
NOUNS = (
    "apple ball bag bell bird boat book bottle bowl box bread bridge brush bucket cake candle cap "
    "car cat chair clock cloud coat comb cup dog door drum duck egg fish flag flower fork fox frog "
    "gate glove goat hammer hat horse house jar kettle key kite knife ladder lamp leaf letter lion "
    "map mirror moon mouse nail nest owl paint pan pear pen piano pig plate plum pot rabbit ring "
    "river road rope rose sand shell ship shoe sock spoon star stone stool sun table tent tower "
    "train tree truck wagon wall wheel whistle window wolf"
).split()
ANIMALS = "cat dog fox frog goat horse lion mouse owl pig rabbit wolf duck fish bird".split()
FOODS = "apple bread cake egg pear plum soup rice cheese honey".split()
CITIES = (
    "Oslo Rome Paris Lima Cairo Tokyo Madrid Berlin Vienna Dublin Lisbon Prague Athens Boston "
    "Delhi Sydney Kyoto Geneva Bergen Porto"
).split()
JOBS = (
    "baker doctor teacher farmer painter singer sailor pilot cook nurse gardener driver writer "
    "builder judge"
).split()
PLACES = (
    "kitchen garden attic cellar barn library garage hall school market station forest tower"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "wet": "dry", "fast": "slow",
    "open": "closed", "full": "empty", "happy": "sad", "old": "young", "hard": "soft",
    "high": "low", "left": "right", "light": "dark", "long": "short", "loud": "quiet",
    "strong": "weak", "rich": "poor", "early": "late", "near": "far", "clean": "dirty",
    "thick": "thin", "first": "last", "true": "false", "win": "lose", "push": "pull",
    "in": "out", "on": "off", "over": "under", "before": "after",
}  # fmt: skip
SOUNDS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink",
    "lion": "roar", "bee": "buzz", "owl": "hoot", "snake": "hiss", "mouse": "squeak",
}  # fmt: skip
COLOUR_OF = {
    "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "the sky": "blue",
    "blood": "red", "milk": "white", "a carrot": "orange", "chocolate": "brown", "a tomato": "red",
    "a banana": "yellow", "a frog": "green", "the sun": "yellow", "a crow": "black",
}  # fmt: skip
CATEGORY = {
    "apple": "fruit", "pear": "fruit", "plum": "fruit", "banana": "fruit", "carrot": "vegetable",
    "potato": "vegetable", "onion": "vegetable", "dog": "animal", "cat": "animal",
    "horse": "animal", "goat": "animal", "lion": "animal", "rose": "flower", "tulip": "flower",
    "daisy": "flower", "hammer": "tool", "saw": "tool", "red": "colour", "blue": "colour",
    "green": "colour", "Monday": "day", "Friday": "day", "Sunday": "day", "chair": "furniture",
    "table": "furniture", "bed": "furniture", "piano": "instrument", "drum": "instrument",
    "violin": "instrument",
}  # fmt: skip
