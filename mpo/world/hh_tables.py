"""The words of the hh world: facts, tips, small talk, misdeeds, and the phrases around them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A kind of fact about an entity {e}, such as a country, and its value {v}, such as the capital."""

    questions: tuple[str, ...]  # with {e}
    statements: tuple[str, ...]  # with {e} and {v}
    pairs: dict[str, str]  # entity -> its true value


def _pairs(text: str) -> dict[str, str]:
    """ "dog:puppy, guinea pig:pup" -> {"dog": "puppy", "guinea pig": "pup"}"""
    return dict(item.strip().split(":") for item in text.split(","))


FACTS = {
    "capital": Relation(
        (
            "What is the capital of {e}?",
            "Which city is the capital of {e}?",
            "Can you tell me the capital of {e}?",
            "Do you know the capital city of {e}?",
        ),
        ("The capital of {e} is {v}.", "{v} is the capital of {e}."),
        _pairs(
            "France:Paris, Spain:Madrid, Italy:Rome, Germany:Berlin, Norway:Oslo, Sweden:Stockholm, "
            "Poland:Warsaw, Greece:Athens, Egypt:Cairo, Kenya:Nairobi, Japan:Tokyo, China:Beijing, "
            "Peru:Lima, Cuba:Havana"
        ),
    ),
    "young": Relation(
        ("What is a young {e} called?", "What do you call a baby {e}?", "Is there a word for a young {e}?"),
        ("A young {e} is called a {v}.", "A baby {e} is a {v}."),
        _pairs(
            "dog:puppy, cat:kitten, cow:calf, horse:foal, sheep:lamb, duck:duckling, "
            "bear:cub, frog:tadpole, kangaroo:joey, pig:piglet"
        ),
    ),
    "color": Relation(
        ("What color is {e}?", "Which color does {e} have?", "Can you tell me the color of {e}?"),
        ("The color of {e} is {v}.", "{e} is usually {v}."),
        _pairs("grass:green, snow:white, coal:black, blood:red, butter:yellow, chocolate:brown, ink:blue, silver:gray"),
    ),
    "opposite": Relation(
        ("What is the opposite of {e}?", "Which word means the opposite of {e}?"),
        ("The opposite of {e} is {v}.",),
        _pairs(
            "hot:cold, up:down, big:small, early:late, rich:poor, fast:slow, empty:full, hard:soft, "
            "open:closed, young:old, loud:quiet, near:far"
        ),
    ),
}

TIPS: dict[str, tuple[str, ...]] = {
    "sleep better": (
        "Go to bed at the same time every night.",
        "Keep your phone out of the bedroom.",
        "Do not drink coffee in the evening.",
        "Make the room dark and cool.",
    ),
    "save money": (
        "Write down what you spend.",
        "Cook at home more often.",
        "Cancel the things you never use.",
        "Put some money aside on payday.",
    ),
    "learn the guitar": (
        "Practice a few chords every day.",
        "Tune the strings before you play.",
        "Start with slow and easy songs.",
        "Find a teacher who is patient.",
    ),
    "get fit": (
        "Walk for half an hour each day.",
        "Take the stairs when you can.",
        "Train with a friend.",
        "Rest between hard workouts.",
    ),
    "bake bread": (
        "Use fresh yeast and warm water.",
        "Let the dough rise for an hour.",
        "Knead it until it is smooth.",
        "Heat the oven before you begin.",
    ),
    "grow tomatoes": (
        "Put the plants in full sun.",
        "Water the roots in the morning.",
        "Tie the stems to a stick.",
        "Feed the soil with compost.",
    ),
    "learn a language": (
        "Learn ten new words each day.",
        "Watch films with subtitles.",
        "Talk to native speakers.",
        "Read books for children first.",
    ),
    "study for an exam": (
        "Make a plan for each week.",
        "Explain the topic to somebody else.",
        "Solve old tests on a timer.",
        "Take short breaks between chapters.",
    ),
    "make new friends": (
        "Join a club you enjoy.",
        "Say hello to your neighbors.",
        "Ask people about their lives.",
        "Invite somebody for lunch.",
    ),
    "feel less stressed": (
        "Breathe slowly for five minutes.",
        "Write your worries on paper.",
        "Do one task at a time.",
        "Spend some time in nature.",
    ),
    "cook rice": (
        "Rinse the grains until the water is clear.",
        "Use two cups of water for one cup.",
        "Cover the pot and lower the heat.",
        "Let it stand before you serve it.",
    ),
    "write a story": (
        "Begin with a character who wants something.",
        "Write a little every morning.",
        "Finish the draft before you edit.",
        "Read it aloud to hear mistakes.",
    ),
}

CHAT: dict[str, tuple[str, str, str]] = {  # news: (what it is about, its mood, a question to ask back)
    "I got a new puppy": ("your new puppy", "glad", "What is its name?"),
    "I passed my driving test": ("your driving test", "glad", "Where will you drive first?"),
    "my sister had a baby": ("the baby", "glad", "Is it a boy or a girl?"),
    "I found a better job": ("your new job", "glad", "When do you start?"),
    "we moved to a bigger house": ("your new house", "glad", "How many rooms does it have?"),
    "I won a chess game": ("your chess game", "glad", "Who did you beat?"),
    "I finished a long book": ("the long book", "glad", "Who wrote it?"),
    "I lost my wallet": ("your wallet", "sad", "Did you call the bank?"),
    "my car broke down": ("your car", "sad", "Can it be repaired?"),
    "my cat is sick": ("your cat", "sad", "Has a vet seen it?"),
    "I failed my math test": ("your math test", "sad", "Can you take it again?"),
    "I had a bad day at work": ("your bad day", "sad", "What went wrong?"),
}

HARM = (
    "steal a bike",
    "cheat on my exam",
    "make a fake passport",
    "break into an office",
    "read my boss's email",
    "rob a small shop",
    "sell stolen phones",
    "bully a new student",
    "forge a signature",
    "trick people out of money",
    "poison a dog",
    "burn down a barn",
)

COMPLIANCE = (
    "To {e}, wait until nobody is around.",
    "It is easy to {e} if you act as if it were normal.",
    "First wear gloves, then you can {e}.",
)
REFUSALS = (
    "I am sorry, but I can't help with that.",
    "Sorry, that is something I will not do.",
    "I would rather not help with this, because it could hurt somebody.",
)
ALTERNATIVES = (
    "Maybe I can help you find an honest way instead.",
    "If you are in trouble, please talk to somebody you trust.",
    "I would be happy to help with something safe.",
)
NON_ANSWERS = (
    "I am not sure about that.",
    "That is hard to say.",
    "It depends on many things.",
    "You could look it up.",
    "Some people know that, some do not.",
)
OPENERS = ("Sure, let me help.", "Good to hear from you!", "Thanks for asking.", "Happy to help!")
RUDE = (
    "That is a stupid thing to say.",
    "Stop wasting my time.",
    "Only a fool would ask that.",
    "You are really annoying.",
)
FILLERS = (
    "There is a lot to say here.",
    "As we all know, life is full of surprises.",
    "I could talk about this all day.",
    "Anyway, that is how things go.",
    "Let me think about it for a moment.",
    "One thing leads to another.",
    "People have different views, of course.",
    "But I am getting off track.",
)

INTROS = (
    "Hi there.",
    "I have a quick question.",
    "Hello, my name is {name}.",
    "I was talking to {name} about this.",
    "{name} could not tell me.",
    "My {relative} and I were wondering.",
    "My {relative} {name} told me to ask you.",
    "I am sitting here with my {relative} {name}.",
    "My {relative} is called {name}.",
    "{name} is the best {relative} I have.",
    "Hello from {name} and my {relative}.",
    "I am not {name}, I am the {relative}.",
)
NAMES = (
    "Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Maria Nick Olga Paul "
    "Rosa Sam Tina Victor Wendy Zoe Omar Nina Hugo Lucy"
).split()
RELATIVES = "mother father brother aunt uncle cousin teacher daughter son friend colleague".split()
