"""Languages by their codes of two letters (ISO 639-1), as prompts name them."""

import re

from gemma_jax.serving.errors import refused

NAMES = dict(
    entry.split("=")
    for entry in (
        "af=Afrikaans am=Amharic ar=Arabic az=Azerbaijani be=Belarusian bg=Bulgarian bn=Bengali "
        "bs=Bosnian ca=Catalan cs=Czech cy=Welsh da=Danish de=German el=Greek en=English "
        "es=Spanish et=Estonian eu=Basque fa=Persian fi=Finnish fr=French ga=Irish gl=Galician "
        "gu=Gujarati ha=Hausa he=Hebrew hi=Hindi hr=Croatian hu=Hungarian hy=Armenian "
        "id=Indonesian ig=Igbo is=Icelandic it=Italian ja=Japanese jv=Javanese ka=Georgian "
        "kk=Kazakh km=Khmer kn=Kannada ko=Korean lo=Lao lt=Lithuanian lv=Latvian mk=Macedonian "
        "ml=Malayalam mn=Mongolian mr=Marathi ms=Malay mt=Maltese my=Burmese ne=Nepali nl=Dutch "
        "no=Norwegian pa=Punjabi pl=Polish ps=Pashto pt=Portuguese ro=Romanian ru=Russian "
        "sd=Sindhi si=Sinhala sk=Slovak sl=Slovenian sn=Shona so=Somali sq=Albanian sr=Serbian "
        "sv=Swedish sw=Swahili ta=Tamil te=Telugu tg=Tajik th=Thai tl=Tagalog tr=Turkish "
        "uk=Ukrainian ur=Urdu uz=Uzbek vi=Vietnamese xh=Xhosa yo=Yoruba zh=Chinese zu=Zulu"
    ).split()
)
_WRITTEN_OUT = re.compile(r"[A-Za-z][A-Za-z ()-]{2,39}")


def language_name(given: str, param: str) -> str:
    """The English name of a language that is given by code or by that name.

    Raises:
      ApiError: A code that is not known here, or no name.
    """
    if (name := NAMES.get(given.lower())) is not None:
        return name
    if _WRITTEN_OUT.fullmatch(given):
        return given
    raise refused(
        f"{param}: expected a code such as 'es' or an English name such as 'Spanish', "
        f"got {given!r:.60}",
        param,
    )
