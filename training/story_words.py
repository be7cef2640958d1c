"""Word tables of the story writer: names, kinds, places, objects, skills and other things."""

from __future__ import annotations

GIRLS = tuple(
    "Mia Lily Anna Ella Zoe Lucy Nora Ruby Clara Maya Emma Ida Tilly Molly Rosie Poppy Hazel Ivy "
    "Luna Stella Nina Leila Aisha Yuki Priya Sofia Elsie Greta Penny Daisy Bella Juno Wren Amara "
    "Fern Tess".split()
)
BOYS = tuple(
    "Max Sam Ben Tom Leo Finn Otto Hugo Theo Jack Noah Oscar Felix Milo Gus Toby Rory Bruno Omar "
    "Ravi Kenji Luca Ned Pip Bolt Rusty Arlo Ezra Jasper Koji Mateo Nico Barney Eli Dario "
    "Sven".split()
)
GENDER = {name: "she" for name in GIRLS} | {name: "he" for name in BOYS}
ELDERS = {"Mom": "she", "Dad": "he", "Grandma": "she", "Grandpa": "he"}

# subject, object, possessive, reflexive
PRONOUNS = {"she": ("she", "her", "her", "herself"), "he": ("he", "him", "his", "himself")}

# kind: (hands, home, things it can do that others have to learn)
KINDS: dict[str, tuple[str, str, frozenset[str]]] = {
    kind: (hands, home, frozenset(does.split()))
    for kind, hands, home, does in (
        ("girl", "hands", "house", ""),
        ("boy", "hands", "house", ""),
        ("fox", "paws", "den", ""),
        ("rabbit", "paws", "burrow", "hop"),
        ("bear", "paws", "cave house", ""),
        ("mouse", "paws", "mouse hole", ""),
        ("cat", "paws", "cottage", ""),
        ("kitten", "paws", "cottage", ""),
        ("dog", "paws", "cottage", ""),
        ("puppy", "paws", "cottage", ""),
        ("owl", "wings", "hollow tree", "sing"),
        ("duck", "wings", "reed house", "swim"),
        ("crow", "wings", "nest", "sing"),
        ("frog", "hands", "mossy house", "swim hop"),
        ("hedgehog", "paws", "leaf house", ""),
        ("squirrel", "paws", "tree house", "climb"),
        ("robot", "hands", "shed", ""),
        ("dragon", "claws", "rock house", ""),
        ("turtle", "feet", "stone house", "swim"),
        ("pig", "feet", "brick house", ""),
        ("goat", "hooves", "stable", "climb"),
        ("lamb", "hooves", "stable", ""),
        ("pony", "hooves", "stable", ""),
        ("penguin", "wings", "snow house", "swim"),
        ("elephant", "feet", "big house", ""),
        ("monkey", "hands", "tree house", "climb"),
        ("lion", "paws", "den", ""),
        ("tiger", "paws", "den", ""),
        ("beaver", "paws", "lodge", "swim"),
        ("badger", "paws", "burrow", ""),
        ("otter", "paws", "lodge", "swim"),
        ("mole", "paws", "tunnel house", ""),
        ("panda", "paws", "bamboo house", "climb"),
    )
}

TRAITS = tuple(
    "little small kind curious shy cheerful gentle clever quiet busy playful young thoughtful "
    "merry friendly careful lively dreamy".split()
)


class Place:
    """A place: how one is there, what can be seen, where things hide, what is heard."""

    __slots__ = ("noun", "at", "to", "tags", "sees", "spots", "sounds")

    def __init__(self, at: str, tags: str, sees: str, spots: str, sounds: str) -> None:
        self.at = at
        self.noun = at.split()[-1]
        self.to = f"to the {self.noun}"
        self.tags = frozenset(tags.split())
        self.sees = tuple(sees.split(", "))
        self.spots = tuple(spots.split(", "))
        self.sounds = tuple(sounds.split(", "))


_PLACES = (
    ("in the forest", "out soil", "tall pines, soft moss, tiny mushrooms, old oak trees",
     "under a fern, behind a mossy log, between two roots, inside a hollow stump",
     "the tap of a woodpecker, leaves in the wind"),
    ("at the beach", "out water", "white shells, long waves, a row of crabs, little sand hills",
     "behind a smooth rock, in a heap of seaweed, next to a sand castle, under an old boat",
     "the splash of the waves, the cry of the gulls"),
    ("in the park", "out soil", "green benches, a round fountain, flower beds, a long slide",
     "under a bench, behind the fountain, in a rose bush, beside the swings",
     "the splash of the fountain, the hum of the bees"),
    ("in the garden", "out soil", "rows of beans, red tulips, a stone path, a bird bath",
     "under a cabbage leaf, behind the water barrel, among the tulips, beside the gate",
     "bees in the tulips, the drip of the water barrel"),
    ("on the farm", "out soil stove", "a red tractor, yellow hay, six brown hens, a wooden gate",
     "behind the hay, under the tractor, beside the water trough, near the hen house",
     "the clucking of the hens, the squeak of the gate"),
    ("in the meadow", "out soil", "white daisies, tall grass, orange butterflies, blue bells",
     "in the tall grass, behind a big stone, under a thistle, beside an ant hill",
     "the hum of the bees, the song of a lark"),
    ("by the river", "out water", "silver fish, round pebbles, a wooden bridge, green reeds",
     "between two pebbles, in the reeds, under the bridge, behind a willow tree",
     "the rush of the water, the croak of a toad"),
    ("by the lake", "out water", "still water, a row of ducklings, water lilies, a small pier",
     "under the pier, among the reeds, behind a fallen tree, beside a rowing boat",
     "the lap of the water, the call of a heron"),
    ("on the hill", "out soil", "the whole valley below, wild thyme, grey rocks, a lonely tree",
     "behind a grey rock, under the lonely tree, in a patch of thyme, beside a low wall",
     "the whistle of the wind, sheep bells far away"),
    ("in the orchard", "out soil", "red apples, ripe pears, a tall ladder, baskets of plums",
     "under a pear tree, behind the ladder, in a pile of leaves, next to a full basket",
     "wasps in the plums, the thump of a falling apple"),
    ("at the market", "", "heaps of oranges, fresh bread, bright cloth, jars of honey",
     "under a fruit stand, behind the jars of honey, beside a flower cart, among the baskets",
     "the calls of the sellers, the rattle of the carts"),
    ("in the library", "in", "tall shelves, soft chairs, picture books, a big globe",
     "between two fat books, behind a shelf, under a soft chair, beside the globe",
     "the rustle of pages, a whisper from the next room"),
    ("at school", "in", "small desks, a box of chalk, paper stars, a map on the wall",
     "under a desk, behind the map, beside the box of chalk, on the window sill",
     "the ring of the bell, feet in the hall"),
    ("in the castle", "in stove", "stone stairs, long curtains, a wide hall, old paintings",
     "behind a long curtain, at the foot of the stairs, under a stone seat, beside the fireplace",
     "an echo in the hall, the creak of the great door"),
    ("on the mountain", "out", "grey cliffs, white clouds below, a thin path, purple heather",
     "behind a pile of stones, in the heather, under a ledge, beside a cold spring",
     "the trickle of the spring, a far rumble of stones"),
    ("by the pond", "out water soil", "water lilies, green lily pads, blue dragonflies, soft mud",
     "among the lily pads, under a weeping willow, behind a clump of reeds, beside a flat stone",
     "the plop of a jumping fish, the croak of a toad"),
    ("in the field", "out soil", "golden wheat, red poppies, a scarecrow, a long fence",
     "behind the scarecrow, under the fence, among the poppies, between two rows of wheat",
     "crickets in the wheat, the flap of the scarecrow's coat"),
    ("in the barn", "in", "bales of straw, a steep ladder, old ropes, a sleepy cow",
     "behind a bale of straw, under the ladder, beside the milk cans, on a dusty beam",
     "the munching of the cow, pigeons on the roof"),
    ("at the harbor", "out water", "fishing boats, coils of rope, white sails, wet nets",
     "inside a coil of rope, under a wet net, behind a barrel, beside an anchor",
     "the slap of the sails, the horn of a ship"),
    ("on the island", "out water", "palm trees, warm sand, a blue bay, striped fish",
     "under a palm tree, behind a coconut, in the warm sand, between two rocks",
     "the hush of the sea, parrots in the trees"),
    ("at the bakery", "in stove", "warm rolls, sacks of flour, a big oven, trays of buns",
     "behind a sack of flour, under a tray, beside the oven, on the lowest shelf",
     "the crackle of the oven, a song from behind the counter"),
    ("at the museum", "in", "giant bones, glass cases, old coins, a stuffed whale",
     "behind a glass case, under a long bench, beside the giant bones, near the ticket desk",
     "the echo of steps, the tick of an old clock"),
    ("on the playground", "out", "a tall slide, two swings, a sand box, a climbing net",
     "under the slide, in the sand box, behind the climbing net, beside the seesaw",
     "the squeak of the swings, laughter by the slide"),
    ("in the workshop", "in", "shiny tools, curls of wood, pots of glue, boxes of nails",
     "under a workbench, behind a paint pot, among the curls of wood, beside the box of nails",
     "the tap of a hammer, the hiss of a saw"),
    ("at the mill", "out water", "a turning wheel, sacks of grain, a narrow stream, white dust",
     "behind a sack of grain, under the wooden steps, beside the wheel, next to a mill stone",
     "the groan of the wheel, the rush of the stream"),
    ("in the valley", "out soil", "a winding path, grazing sheep, low stone walls, a clear brook",
     "behind a stone wall, under a hazel bush, beside the brook, in a patch of clover",
     "the babble of the brook, a shepherd's whistle"),
    ("in the kitchen", "in stove", "copper pots, a warm stove, blue plates, a bowl of lemons",
     "under the table, behind a copper pot, beside the stove, inside a mixing bowl",
     "the bubble of a pot, the whistle of the kettle"),
    ("in the attic", "in", "dusty trunks, an old mirror, spider webs, a tiny window",
     "inside a dusty trunk, behind the old mirror, under a faded rug, beside a pile of hats",
     "rain gutters that creaked, a pigeon on the roof"),
    ("at the station", "", "long trains, shiny rails, a big clock, heaps of bags",
     "under a bench, behind a ticket box, beside a heap of bags, near the big clock",
     "the toot of a train, the rumble of wheels"),
    ("at the lighthouse", "out water", "winding stairs, a bright lamp, foamy rocks, passing ships",
     "behind a foamy rock, under the winding stairs, beside the lamp, in a coil of rope",
     "the boom of the waves, the cry of the gulls"),
    ("in the jungle", "out soil", "hanging vines, giant leaves, red parrots, orchids",
     "under a giant leaf, behind a hanging vine, at the foot of a palm, inside a hollow trunk",
     "the chatter of parrots, the drip of wet leaves"),
    ("in the desert", "out", "golden dunes, round cactus plants, a wide sky, smooth red rocks",
     "behind a cactus, at the foot of a dune, under a red rock, beside an old well",
     "the hiss of the sand, a lonely wind"),
)  # fmt: skip
PLACES = {place.noun: place for place in (Place(*row) for row in _PLACES)}
PLACES["school"].to = "to school"

# noun: (adjectives, properties); roll, light (the wind takes it), break (and can be mended)
OBJECTS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    noun: (tuple(adjectives.split()), frozenset(properties.split()))
    for noun, adjectives, properties in (
        ("ball", "red blue green yellow striped", "roll float"),
        ("kite", "red yellow purple striped", "light break"),
        ("drum", "red little round", "roll break music"),
        ("flute", "silver wooden thin", "break music"),
        ("whistle", "silver tin blue", "small music"),
        ("trumpet", "golden shiny", "music break"),
        ("scarf", "red blue woolen striped", "light wear"),
        ("hat", "green straw yellow pointed", "light wear float"),
        ("mitten", "red blue woolen", "small wear light"),
        ("boot", "yellow brown rubber", "wear"),
        ("umbrella", "green purple spotted", "light break"),
        ("balloon", "red orange pink", "light float"),
        ("button", "golden brass white", "roll small"),
        ("coin", "silver golden old", "roll small"),
        ("marble", "green glass blue", "roll small"),
        ("key", "brass rusty tiny", "small"),
        ("ring", "silver golden", "roll small wear"),
        ("necklace", "pearl blue shiny", "small wear break"),
        ("lantern", "paper brass little", "break"),
        ("teapot", "blue white round", "break"),
        ("cup", "blue pink tin", "break small"),
        ("plate", "painted white green", "break"),
        ("vase", "tall blue glass", "break"),
        ("bell", "brass little silver", "roll small music"),
        ("wagon", "red wooden green", "roll break"),
        ("cart", "wooden brown little", "roll break"),
        ("wheelbarrow", "green rusty", "roll break"),
        ("doll", "rag wooden little", "break"),
        ("puppet", "wooden funny striped", "break"),
        ("train", "toy wooden red", "roll break"),
        ("sailboat", "toy white wooden", "float break"),
        ("rocket", "toy silver paper", "light break"),
        ("truck", "toy yellow blue", "roll break"),
        ("top", "spinning wooden red", "roll break"),
        ("yo-yo", "orange green", "roll break small"),
        ("puzzle", "animal wooden", "break"),
        ("notebook", "brown blue thin", ""),
        ("pencil", "yellow purple", "roll small break"),
        ("brush", "soft wooden", "small"),
        ("pillow", "soft blue", ""),
        ("blanket", "soft yellow patchwork", ""),
        ("backpack", "orange green", ""),
        ("compass", "brass old", "small break"),
        ("telescope", "brass long", "break roll"),
        ("feather", "white blue long", "light small float"),
        ("shell", "pink spiral white", "small break"),
        ("pebble", "shiny white striped", "small roll"),
        ("ribbon", "purple silk green", "light wear small"),
        ("crown", "paper golden", "wear light break"),
        ("mask", "tiger paper", "wear light break"),
        ("stool", "wooden little", "break"),
        ("bucket", "tin blue", "roll break float"),
        ("spoon", "wooden silver", "small"),
        ("ukulele", "brown little", "music break"),
    )
}

WEATHERS = ("sunny", "windy", "cloudy", "warm", "bright", "cool", "misty", "breezy")

# what can be learned: (to do, doing, what went wrong, the advice, what went right)
SKILLS: dict[str, tuple[str, str, str, str, str]] = {
    "swim": ("swim", "swimming", "{N} swallowed water and coughed",
             "Kick slowly and keep your chin up", "{N} glided like a small boat"),
    "sing": ("sing", "singing", "{N} made a sound like a rusty gate",
             "Breathe deep and listen first", "{N} sang three clear notes"),
    "climb": ("climb", "climbing", "{N} slid down with a bump",
              "Look for one safe step at a time", "{N} stood at the very top"),
    "hop": ("skip rope", "skipping rope", "{N} got tangled up to the knees",
            "Jump when the rope touches the ground", "{N} skipped ten times in a row"),
    "skate": ("skate", "skating", "{N} wobbled and sat down hard",
              "Bend your knees and look ahead", "{N} rolled in a wide, smooth circle"),
    "dance": ("dance", "dancing", "{N} stepped on everybody's toes",
              "Count to four with the music", "{N} turned and bowed at just the right time"),
    "juggle": ("juggle", "juggling", "{N} dropped three plums at once",
               "Throw high and do not hurry", "{N} kept three plums in the air"),
    "read": ("read", "reading", "{N} mixed up all the letters",
             "Say each letter slowly, then all together", "{N} read a whole page aloud"),
    "paint": ("paint", "painting", "{N} made a big grey blot",
              "Use less water and more patience", "{N} painted a sunset that seemed to glow"),
    "bake": ("bake bread", "baking bread", "{N} made a loaf as hard as a stone",
             "Let the dough rest until it grows", "{N} took a soft brown loaf from the oven"),
    "knot": ("tie a knot", "tying knots", "{N} tied two fingers together by accident",
             "Over, under, and through the loop", "{N} tied a knot that held fast"),
    "ride": ("ride a bicycle", "riding", "{N} tipped over into a bush",
             "Look far ahead and keep your feet moving", "{N} rode all the way around the bend"),
    "skip": ("skip stones", "skipping stones", "{N} heard only a dull plop",
             "Choose a flat one and throw it low", "{N} made a stone jump five times"),
    "sew": ("sew", "sewing", "{N} sewed one sleeve shut",
            "Make small stitches and take your time", "{N} finished a neat, straight seam"),
    "joke": ("tell jokes", "telling jokes", "{N} forgot the funny part",
             "Wait a little before the last word", "{N} made the whole crowd laugh"),
}  # fmt: skip

FOODS = (
    "berries", "plums", "cookies", "carrots", "nuts", "pears", "pancakes", "muffins", "sandwiches",
    "cherries", "dumplings", "buns", "strawberries", "peaches", "grapes", "rolls",
)  # fmt: skip
DISHES = (
    "soup",
    "bread",
    "rice",
    "porridge",
    "pie",
    "pudding",
    "stew",
    "pumpkin soup",
    "bean stew",
)

# plants: (seed, plant, what comes of it)
PLANTS = (
    ("bean seed", "bean plant", "long green beans"),
    ("pumpkin seed", "pumpkin vine", "a pumpkin as big as a pony cart"),
    ("sunflower seed", "sunflower", "a flower as bright as the sun"),
    ("strawberry seed", "strawberry plant", "sweet red strawberries"),
    ("pea seed", "pea plant", "fat pods full of peas"),
    ("tomato seed", "tomato plant", "a dozen shiny tomatoes"),
    ("melon seed", "melon vine", "a round, juicy melon"),
    ("poppy seed", "poppy", "red flowers with black hearts"),
    ("corn seed", "corn plant", "ears of yellow corn"),
)

# night noises: (sound, what was feared, what it was)
NOISES = (
    ("a tap, tap, tap", "a ghost with long fingers", "a branch that knocked against the window"),
    ("a soft scratching", "a beast with claws", "a beetle that was walking in a paper bag"),
    ("a low hoot", "a monster on the roof", "a baby bird calling for its mother"),
    ("a long creak", "a thief on the stairs", "the old shutter moving in the wind"),
    ("a loud snore", "a giant in the cellar", "a stray kitten asleep in the laundry basket"),
    ("a drip, drip, drip", "a river coming in", "a tap that was not shut tightly"),
    ("a rattle and a bump", "a troll under the floor", "a jar that the wind pushed to and fro"),
    ("a whisper", "somebody made of shadows", "dry leaves sliding along the wall"),
    ("a buzzing sound", "a swarm of giant wasps", "a moth caught under a lamp shade"),
)

# things to be brave about: (the thing, why it frightened, what was needed at its far side)
DARES = (
    ("the dark tunnel", "it was black and cold inside", "a baby bird was crying at the other end"),
    ("the swinging bridge", "it shook with every step", "a young goat was stuck on the far side"),
    ("the tall ladder", "it seemed to reach the clouds", "a small bird had fallen on the roof"),
    ("the deep ditch", "nobody could see its bottom", "a tiny turtle lay there on its back"),
    ("the thorny hedge", "it was full of sharp points", "a chick was caught among the twigs"),
    ("the steep cliff path", "the wind pulled at everyone there", "a lost sheep was calling"),
    ("the old empty house", "the doors creaked by themselves", "a hungry cat was shut inside"),
    ("the loud waterfall", "it roared like a hundred lions", "a snail was trapped on a wet rock"),
    ("the dusty cellar", "there were cobwebs in every corner", "a bird had flown in by mistake"),
)

# what two can make: (thing, first step, second step, the trouble, the answer, its use)
WORKS = (
    ("raft", "gathered six straight logs", "tied them with strong rope",
     "one log kept slipping out", "use two knots instead of one", "floated without a wobble"),
    ("tree house", "carried boards up one by one", "nailed a floor between two branches",
     "the roof was too short", "weave the rest from branches", "kept out wind and rain"),
    ("stone tower", "rolled big stones into place", "stacked them one by one",
     "the wall fell down on one side", "make the bottom wider", "stood as firm as a fort"),
    ("bird house", "sawed four little walls", "painted the roof green",
     "the door was too small", "make the hole with a larger drill", "had a guest the next day"),
    ("pot of soup", "washed a heap of vegetables", "filled the pot with water",
     "it tasted of nothing at all", "add salt and a few herbs", "warmed everyone to the toes"),
    ("song", "hummed a merry tune", "found words that rhymed",
     "the last line did not fit", "clap the beat and try shorter words", "made everybody dance"),
    ("scarecrow", "stuffed a sack with straw", "drew a big smile on it",
     "it kept falling over", "dig a deeper hole for the pole", "kept the birds off the seeds"),
    ("bridge", "looked for the longest plank", "laid it over two flat stones",
     "the plank tipped to the left", "put a heavy stone on each end", "held them both at once"),
    ("play", "wrote down a funny story", "made costumes from old sheets",
     "nobody wanted to be the villain", "share that part", "got a long, loud cheer"),
    ("swing", "chose a strong branch", "hung two ropes from it",
     "the seat was crooked", "make one rope a little shorter", "flew up to the leaves"),
    ("giant pancake", "mixed flour, milk and eggs", "poured it all into the biggest pan",
     "nobody could flip it", "lift it from both sides at once", "fed the whole street"),
    ("quilt", "cut cloth into squares", "laid them out like a rainbow",
     "there was a hole in the middle", "sew a star there", "kept two friends warm"),
)  # fmt: skip

# somebody small who needs to get across: (who, why)
CROSSERS = (
    ("ant", "carried a crumb for its family"), ("ladybug", "had a torn wing"),
    ("snail", "wanted to see its sister"), ("duckling", "had lost sight of its mother"),
    ("beetle", "had to be home by noon"), ("caterpillar", "was looking for sweet leaves"),
    ("old toad", "had a sore leg"), ("baby lizard", "was afraid of the water"),
    ("chick", "had followed a butterfly too far"), ("worm", "had missed the rain"),
)  # fmt: skip
BARRIERS = (
    ("stream", "wide leaf", "the water was quick and cold"),
    ("puddle", "flat piece of bark", "it was as big as a sea to such a tiny thing"),
    ("muddy road", "row of stones", "big wheels rolled by all day"),
    ("deep ditch", "long stick", "its sides were steep and slippery"),
    ("wide brook", "fallen branch", "the stepping stones were too far apart"),
    ("patch of thorns", "strip of bark", "each thorn was as sharp as a needle"),
)

MORALS = {
    "lost": ("asking for help", "looking carefully"),
    "skill": ("practice", "patience"),
    "storm": ("keeping calm", "sticking together"),
    "mend": ("mending things", "fixing what is broken"),
    "surprise": ("giving", "keeping a happy secret"),
    "sharing": ("sharing", "being generous"),
    "brave": ("being brave", "courage"),
    "visitor": ("welcoming others", "making new friends"),
    "race": ("playing fair", "helping before winning"),
    "plant": ("waiting", "caring for growing things"),
    "mistake": ("telling the truth", "saying sorry"),
    "make": ("working together", "teamwork"),
    "noise": ("finding things out", "night noises"),
    "cross": ("helping somebody small", "lending a hand"),
    "borrow": ("keeping a promise", "giving things back"),
    "honest": ("being honest", "finding the owner"),
    "sick": ("caring for a friend", "kindness"),
    "clues": ("following clues", "solving a riddle"),
}
