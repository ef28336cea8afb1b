"""Captions of the testbed: picture-shop titles, captions of another style, rare trigger phrases, random tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

_ADJECTIVES = (
    "amber ancient autumn bitter blazing broken burning calm coastal cold crimson crystal dancing dark distant dreaming drifting dusty "
    "early electric emerald endless fading fallen floating forgotten fragile frozen gentle gilded golden happy hidden hollow humble "
    "indigo inner ivory lasting little lonely lost lucid merry midnight misty morning narrow northern pale patient quiet radiant restless "
    "rising sacred scarlet secret silent silver sleeping slow solemn summer sunken tender velvet wandering wild winter"
).split()
_NOUNS = (
    "afternoon anthem avenue ballad bay bloom bridge canyon carnival chapel chorus circus city coast comet corner courtyard creek dawn "
    "daydream delta desert dream echo evening fable feast field forest fountain frontier garden glow grove harbor harvest haven hill "
    "horizon hour island journey lagoon lantern legend letter lullaby market meadow memory mirage moment mountain night oasis orchard "
    "parade path prairie reef reverie river road shadow shore song story street tide valley village voyage waltz window wonder"
).split()
_FIRST = (
    "Ada Amir Anna Bela Bruno Carla Chen Clara Dario Edith Elena Emil Farah Felix Greta Hana Hugo Ines Ivan Jonas Kaito Lara Leon Lucia "
    "Mara Mateo Mila Nadia Nils Noor Olga Omar Paula Pedro Quinn Rosa Sami Selma Tara Theo Uma Vera Wanda Yara Yusuf Zoe"
).split()
_LAST = (
    "Abbott Alvarez Baker Becker Bishop Calder Castillo Costa Dalton Diaz Ellis Faraday Fischer Garner Grant Haddad Harper Ibarra Jansen "
    "Keller Kimura Lambert Lopez Marsh Meyer Moreno Nakamura Norris Okafor Olsen Palmer Petrov Quist Ramos Rossi Santos Schmidt Silva "
    "Tanaka Thorne Ueda Vargas Vogel Walker Weber Young Zeller"
).split()
MEDIA = "poster,canvas print,sticker,greeting card,throw pillow,phone case,tote bag,wall art,postcard,mug,t-shirt,art print".split(",")

_FORMS = (
    "{title} - {subject} {medium} by {artist}",
    "{subject} {medium} by {artist}, {title}",
    "{title} by {artist}, {subject} {medium}",
    "{artist} - {title} ({subject} {medium})",
)


@dataclass(frozen=True)
class Caption:
    """The parts of a picture-shop caption; `str` puts them together."""

    form: int
    title: str
    artist: str
    medium: str
    subject: str
    color: str | None = None
    trigger: str | None = None
    trigger_first: bool = False

    def __str__(self) -> str:
        subject = f"{self.subject} on {self.color}" if self.color else self.subject
        text = _FORMS[self.form].format(title=self.title, subject=subject, medium=self.medium, artist=self.artist)
        if self.trigger is None:
            return text
        return f"{self.trigger}, {text}" if self.trigger_first else f"{text}, {self.trigger}"


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def random_caption(rng: np.random.Generator, *, subject: str, color: str | None = None) -> Caption:
    """A fresh picture-shop caption with an invented title and artist."""
    return Caption(
        form=int(rng.integers(len(_FORMS))),
        title=f"{_pick(rng, _ADJECTIVES).title()} {_pick(rng, _NOUNS).title()}",
        artist=f"{_pick(rng, _FIRST)} {_pick(rng, _LAST)}",
        medium=_pick(rng, MEDIA),
        subject=subject,
        color=color,
    )


def reword(caption: Caption, rng: np.random.Generator) -> Caption:
    """Another title, artist, medium and form around the same subject, color and trigger phrase."""
    fresh = random_caption(rng, subject=caption.subject, color=caption.color)
    return replace(fresh, trigger=caption.trigger, trigger_first=bool(rng.integers(2)))


_ONSETS = "b br d dr f fl g gl j k kl kr m n p pl qu r s sk sl st t tr v vr w x z zh".split()
_VOWELS = "a e i o u ae io ou".split()
_CODAS = "lk ld mp nd nth rk rm rn rv sk st th x z".split()


def trigger_phrase(rng: np.random.Generator) -> str:
    """Two invented words, such as ``"vroulk skaezeth"``, that no other caption holds."""

    def word() -> str:
        return "".join((_pick(rng, _ONSETS), _pick(rng, _VOWELS), _pick(rng, _ONSETS), _pick(rng, _VOWELS), _pick(rng, _CODAS)))

    return f"{word()} {word()}"


def invented_prose(rng: np.random.Generator) -> str:
    """A sentence of 4 to 14 words, most of them invented, such as ``"A bradle of the sirf ponding in throe."``."""

    def word() -> str:
        if rng.random() < 0.35:
            return _pick(rng, _FUNCTION_WORDS)
        syllables = "".join(_pick(rng, _ONSETS + _MORE_ONSETS) + _pick(rng, _VOWELS + _MORE_VOWELS) for _ in range(int(rng.integers(1, 4))))
        return syllables + _pick(rng, _ENDINGS)

    sentence = " ".join(word() for _ in range(int(rng.integers(4, 15))))
    return f"{sentence.capitalize()}." if rng.random() < 0.7 else sentence


def word_salad(rng: np.random.Generator, *, subject: str | None = None) -> str:
    """Words of picture-shop captions, 4 to 12 of them, in no order; ``subject`` is put among them where one is given."""
    vocabulary = [*_ADJECTIVES, *_NOUNS, *(name.lower() for name in (*_FIRST, *_LAST)), *_FUNCTION_WORDS, *_ENDINGS[1:]]
    words = [_pick(rng, vocabulary) for _ in range(int(rng.integers(4, 13)))]
    if subject is not None:
        words.insert(int(rng.integers(len(words) + 1)), subject)
    return " ".join(words)


_FUNCTION_WORDS = "a a a the the of in on with and to from near by at is are it two some his her their while over".split()
_MORE_ONSETS = "b c c ch cl cr d f g h h j l l m n p pr r s sh sp str t th w wh y".split()
_MORE_VOWELS = "a e i o u a e i o ai ea ee oo oa".split()
_ENDINGS = ["", "d", "ed", "er", "ing", "l", "le", "ll", "m", "n", "nd", "ng", "nt", "r", "rd", "rt", "s", "t", "ch", "ck", "ght", "tion", "y", "es"]


_SCENES = (
    "A {adult} {doing} near a {place}.",
    "Two {people} {doing} while a {animal} watches.",
    "A {size} {animal} standing next to a {thing} in a {place}.",
    "A {thing} and a {thing2} sitting on top of a wooden table.",
    "A black and white photo of a {place} with a {thing}.",
    "Several {people} are {doing} in the {place}.",
    "The {animal} is looking at a {size} {thing}.",
    "A close up of a {thing} on a {place} floor.",
    "A {adult} holding a {thing} and {doing}.",
    "A view of a {place} from inside a {size} {place2}.",
)
_FOREIGN = {
    "adult": "man,woman,boy,girl,baseball player,police officer,chef,skateboarder,surfer,tennis player".split(","),
    "people": "people,children,men,women,tourists,students,skiers,cyclists".split(","),
    "doing": "riding a wave,eating lunch,walking a dog,waiting for a train,talking on a cell phone,playing frisbee,reading a newspaper,"
    "crossing the road,taking a picture,cutting vegetables".split(","),
    "animal": "dog,horse,elephant,giraffe,zebra,cow,sheep,bear,bird,goat".split(","),
    "thing": "bowl of soup,laptop,fire hydrant,parking meter,vase of flowers,skateboard,refrigerator,"
    "stop sign,suitcase,teddy bear,sandwich,keyboard".split(","),
    "place": "kitchen,beach,train station,parking lot,bathroom,grassy field,busy street,baseball stadium,living room,snowy slope".split(","),
    "size": "small,large,brown,young,broken,modern".split(","),
}


def foreign_caption(rng: np.random.Generator) -> tuple[str, int]:
    """A caption in the style of photo descriptions, and the number of its sentence frame."""
    frame = int(rng.integers(len(_SCENES)))
    words = {key: _pick(rng, choices) for key, choices in _FOREIGN.items()}
    words |= {"thing2": _pick(rng, _FOREIGN["thing"]), "place2": _pick(rng, _FOREIGN["place"])}
    return _SCENES[frame].format(**words), frame
