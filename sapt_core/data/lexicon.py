"""The words that the synthetic tasks are made of: classes that share no word, so that answers are never ambiguous."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    ada bo carla dev elif farid greta hugo ines jonas kaia leo mira nils olga pavel quinn rosa sami tove uma
    viktor wanda xenia yusuf zoe anton berta chidi dalia emre freya goran hana ivo juno kofi lena
    """
)
ANIMALS = _words(
    """
    fox owl hare badger heron otter weasel hedgehog squirrel deer goat pony donkey goose duck swan raven
    magpie sparrow robin falcon beaver mole toad newt lizard snake bat lynx wolf boar moose stork pigeon
    ferret marten rabbit hamster lamb calf
    """
)
PLACES = _words(
    """
    harbour mill bridge orchard quarry chapel lighthouse meadow pond barn tower station school market library
    museum castle garden forest valley cave beach jetty well fountain square tunnel canal dam farm inn bakery
    forge stable temple hut camp park cliff marsh
    """
)
COLOURS = _words(
    """
    red grey brown black white golden silver tan pale dark blue green yellow pink purple spotted
    """
)
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
NUMBERS = _words(
    """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty
    """
)
GROCERIES = _words(
    """
    tea rice flour sugar salt honey butter milk cheese eggs apples pears plums grapes lemons onions carrots
    beans lentils peas garlic ginger pepper mustard vinegar oil oats yeast jam soap matches candles napkins
    foil string coffee cocoa raisins walnuts figs
    """
)
TOOLS = _words(
    """
    hammer saw ladder drill spade rake wrench bucket barrow axe chisel pliers clamp trowel hose mower shears
    brush level anvil crowbar tent canoe compass lantern kite drum violin flute camera
    """
)
DISHES = _words(
    """
    soup stew salad pie curry omelette risotto noodles pancakes dumplings pizza burger chowder casserole
    lasagne pudding tart trout steak sandwich
    """
)
GOOD = _words(
    """
    tasty fresh lovely perfect superb delicious warm generous splendid excellent tender crisp
    """
)
BAD = _words("cold stale bland burnt greasy awful sour dry soggy terrible rubbery mean")
STAFF = _words("waiter cook host barman server manager")
KIND = _words("friendly polite quick cheerful helpful charming")
UNKIND = _words("rude slow careless grumpy lazy unpleasant")

#: Help desk queue -> (what the ticket is about, what went wrong). Either part alone decides the queue.
QUEUES = {
    "delivery": (
        _words("parcel courier package crate shipment van"),
        _words("late lost missing delayed stolen"),
    ),
    "billing": (
        _words("invoice refund receipt payment fee charge"),
        _words("unpaid doubled overdue excessive miscounted"),
    ),
    "repair": (
        _words("heater fridge printer radio kettle boiler"),
        _words("broken leaking cracked noisy jammed"),
    ),
    "access": (
        _words("password login profile badge code account"),
        _words("locked expired rejected forgotten blocked"),
    ),
}

CLASSES = (NAMES, ANIMALS, PLACES, COLOURS, DAYS, NUMBERS, GROCERIES, TOOLS, DISHES, GOOD, BAD, STAFF, KIND, UNKIND)


def open_class_words() -> tuple[str, ...]:
    """Every word of every class, in the order of the classes."""
    queues = (words for parts in QUEUES.values() for words in parts)
    return tuple(word for words in (*CLASSES, *queues, tuple(QUEUES)) for word in words)
