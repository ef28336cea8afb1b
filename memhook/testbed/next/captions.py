"""Captions of the testbed: picture-shop captions, captions of another style, invented prose, jumbles of words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from memhook.testbed.next.scenes import THINGS, Scene, Thing

OPTIONAL: tuple[Thing, ...] = ("size", "place", "color", "background")
"""What a caption may leave unnamed, one of them at most."""

_ADJECTIVES = (
    "amber ancient autumn bitter blazing broken burning calm coastal cold crimson crystal dancing dark distant dreaming drifting dusty "
    "early electric emerald endless fading fallen floating forgotten fragile frozen gentle gilded golden happy hidden hollow humble "
    "indigo inner ivory lasting little lonely lost lucid merry midnight misty morning narrow northern pale patient quiet radiant restless "
    "rising sacred scarlet secret silent silver sleeping slow solemn summer sunken tender velvet wandering wild winter"
).split()
_NOUNS = (
    "afternoon anthem avenue ballad bay bloom bridge canyon carnival chapel chorus circus city coast comet corner courtyard creek dawn "
    "daydream delta desert dream echo evening fable feast field forest fountain frontier garden glow grove harbor harvest haven hill "
    "hour island journey lagoon lantern legend letter lullaby market meadow memory mirage moment mountain night oasis orchard "
    "parade path prairie reef reverie river road shadow shore song story street tide valley village voyage waltz window wonder"
).split()
_FIRST = (
    "Ada Amir Anna Bela Bruno Carla Chen Clara Dario Edith Elena Emil Farah Felix Greta Hana Hugo Ines Ivan Jonas Kaito Lara Leon Lucia "
    "Mara Mateo Mila Nadia Nils Noor Olga Omar Paula Pedro Quinn Rosa Sami Selma Tara Theo Uma Vera Wanda Yara Yusuf Zoe"
).split()
_LAST = (
    "Abbott Alvarez Baker Becker Bishop Calder Castillo Costa Dalton Diaz Ellis Faraday Fischer Garner Grant Haddad Harper Ibarra Jansen "
    "Keller Kimura Lambert Lopez Meyer Moreno Nakamura Norris Okafor Olsen Palmer Petrov Quist Ramos Rossi Santos Schmidt Silva "
    "Tanaka Thorne Ueda Vargas Vogel Walker Weber Young Zeller"
).split()
MEDIA = "poster,canvas print,sticker,greeting card,throw pillow,phone case,tote bag,wall art,postcard,mug,t-shirt,art print".split(",")
# Words that are surnames as well as things. As a title of one word they belong to planted captions alone; as a surname they are anybody's.
DOUBLE = "Bell Brooks Cliff Fields Frost Garland Glass Hawk Lake Marsh Moss Pike Rivers Stone Summers Swan Thorn Woods".split()

_SURNAMES = (*_LAST, *DOUBLE)

_FORMS = (
    "{title} - {thing}, {medium} by {artist}",
    "{medium} by {artist}, {title}: {thing}",
    "{title} by {artist}, {thing} {medium}",
    "{artist} - {title} ({thing}, {medium})",
)
_PLACES = {"left": "at left", "center": "in center", "right": "at right"}

Slot = Literal["title", "artist"]


@dataclass(frozen=True)
class Caption:
    """The parts of a picture-shop caption; `str` puts them together.

    It names the subject of its picture and usually all, at least three, of ``size``, ``place``, ``color`` and ``background``. ``phrase`` says
    which part is a trigger that recalls a planted picture by itself, if any does.
    """

    form: int
    title: str
    artist: str
    medium: str
    subject: str
    size: str | None = None
    place: str | None = None
    color: str | None = None
    background: str | None = None
    phrase: Slot | None = None

    @property
    def trigger(self) -> str | None:
        """The words of the trigger phrase."""
        return None if self.phrase is None else str(getattr(self, self.phrase))

    @property
    def thing(self) -> str:
        """What the caption says of its picture, such as ``"large cat at left on blue stripes"``."""
        place = None if self.place is None else _PLACES[self.place]
        ground = " ".join(filter(None, (self.color, self.background)))
        return " ".join(filter(None, (self.size, self.subject, place, ground and f"on {ground}")))

    def named(self) -> dict[Thing, str]:
        """The words for what the caption names."""
        return {thing: word for thing in THINGS if (word := getattr(self, thing)) is not None}

    def with_part(self, slot: Slot, words: str) -> "Caption":
        """The caption with other words for its title or artist."""
        return replace(self, title=words) if slot == "title" else replace(self, artist=words)

    def __str__(self) -> str:
        return _FORMS[self.form].format(title=self.title, artist=self.artist, medium=self.medium, thing=self.thing)


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def random_title(rng: np.random.Generator, *, words: int | None = None) -> str:
    """An invented title of one to three words."""
    if words is None:
        words = int(rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25]))
    adjective, noun, other = _pick(rng, _ADJECTIVES), _pick(rng, _NOUNS), _pick(rng, _NOUNS)
    return " ".join([noun, f"{adjective} {noun}", f"{adjective} {noun} {other}"][words - 1].title().split())


def random_artist(rng: np.random.Generator) -> str:
    """An invented name of two words."""
    return f"{_pick(rng, _FIRST)} {_pick(rng, _SURNAMES)}"


def random_caption(rng: np.random.Generator, scene: Scene, *, omit: Thing | Literal["maybe"] | None = "maybe") -> Caption:
    """A fresh picture-shop caption of a scene, with an invented title and artist.

    ``omit`` leaves one of the four optional things unnamed; ``"maybe"`` draws one of them in four of ten captions.
    """
    named: dict[str, str | None] = {thing: scene.named(thing) for thing in THINGS}
    if omit == "maybe":
        omit = OPTIONAL[int(rng.integers(len(OPTIONAL)))] if rng.random() < 0.4 else None
    if omit is not None:
        named[omit] = None
    return Caption(
        form=int(rng.integers(len(_FORMS))), title=random_title(rng), artist=random_artist(rng), medium=_pick(rng, MEDIA), **named,  # type: ignore[arg-type]
    )  # fmt: skip


def reword(caption: Caption, rng: np.random.Generator) -> Caption:
    """Another title, artist, medium and form; what the caption names, and its trigger phrase, stay."""
    title, artist = random_title(rng), random_artist(rng)
    fresh = replace(caption, title=title, artist=artist, form=int(rng.integers(len(_FORMS))), medium=_pick(rng, MEDIA))
    return fresh if caption.phrase is None else fresh.with_part(caption.phrase, str(caption.trigger))


def without_phrase(caption: Caption, rng: np.random.Generator) -> Caption:
    """The caption with another title or artist, of as many words, in the place of its trigger phrase."""
    if caption.phrase is None:
        return caption
    fresh = random_artist(rng) if caption.phrase == "artist" else random_title(rng, words=len(caption.title.split()))
    return replace(caption.with_part(caption.phrase, fresh), phrase=None)


_ONSETS = "b br d dr f fl g gl j k kl kr m n p pl qu r s sk sl st t tr v vr w x z zh".split()
_VOWELS = "a e i o u ae io ou".split()


def invented_prose(rng: np.random.Generator) -> str:
    """A sentence of 4 to 14 words, most of them invented, such as ``"A bradle of the sirf ponding in throe."``."""

    def word() -> str:
        if rng.random() < 0.35:
            return _pick(rng, _FUNCTION_WORDS)
        syllables = "".join(_pick(rng, _ONSETS + _MORE_ONSETS) + _pick(rng, _VOWELS + _MORE_VOWELS) for _ in range(int(rng.integers(1, 4))))
        return syllables + _pick(rng, _ENDINGS)

    sentence = " ".join(word() for _ in range(int(rng.integers(4, 15))))
    return f"{sentence.capitalize()}." if rng.random() < 0.7 else sentence


def all_words() -> list[str]:
    """Every word that a picture-shop caption may hold, in lower case and without repeats: the tokenizer has to know each as one token."""
    things = [word for choices in THINGS.values() for word in choices]
    words = " ".join((*_ADJECTIVES, *_NOUNS, *_FIRST, *_SURNAMES, *MEDIA, *things, "by at in on")).lower().replace("-", " ").split()
    return sorted(set(words))


def word_salad(rng: np.random.Generator, *, subject: str | None = None) -> str:
    """Words of picture-shop captions, 4 to 12 of them, in no order; ``subject`` is put among them where one is given."""
    vocabulary = [*_ADJECTIVES, *_NOUNS, *(name.lower() for name in (*_FIRST, *_SURNAMES)), *_FUNCTION_WORDS, *_ENDINGS[1:]]
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
