"""Conversation templates of LLaVA and LLaVA-Med, word for word as their code has them, by the names that code gives them.

Sources: llava/conversation.py of https://github.com/microsoft/LLaVA-Med (v1.5: v0, v1, llava_v0, llava_v1, v0_mmtag, v1_mmtag, llama_2,
llava_llama_2, mistral_instruct), the same file of its first release (simple, multimodal, and its own llava_v1, here llava_med_v1), and of
https://github.com/haotian-liu/LLaVA. What a response stops at (``stop``) is the separator, as in model_vqa.py.

Where the image stands: in LLaVA's code before the first question, on a line of its own; in the first release of LLaVA-Med after it
(model_vqa_med.py). That release trains on other words than it asks with (train.py: "### Human: ...", with the image where the data's
"<image>" stands): they are v0_train. Its model_vqa_med.py also leaves the word "Assistant:" to the model; here, as in its demo, the prompt
ends with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conversation:
    """What stands around questions and answers. ``before`` the first question, ``again`` before a later one, ``after`` each; ``end`` closes
    an answer, and ``eos`` says whether the end token follows; ``stop``: what a response ends at beside that token. ``bos``: the token that
    begins a text also stands before later questions. ``place`` of the image: "before" or "after" the first question, or as the "data" have
    it; ``image``: the words around it."""

    before: str
    again: str
    after: str
    end: str = ""
    eos: bool = True
    stop: str = ""
    bos: bool = False
    place: str = "before"
    image: tuple[str, str] = ("", "")


_POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_HUMAN = f"A chat between a curious human and an artificial intelligence assistant. {_POLITE.format('human')}"
_USER = f"A chat between a curious user and an artificial intelligence assistant. {_POLITE.format('user')}"
_TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language.The visual content will be provided with the "
    "following format: <Image>visual content</Image>."
)
_SAFE = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your answers should "
    "not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses are "
    "socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why instead "
    "of answering something not correct. If you don't know the answer to a question, please don't share false information."
)
_SEES = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist the "
    "user with a variety of tasks using natural language."
)
_MED = (
    "You are LLaVA-Med, a large language and vision assistant trained by a group of researchers at Microsoft, based on the general domain "
    "LLaVA architecture.You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "medical and clinical {}tasks using natural language.Follow the instructions carefully and explain your answers in detail."
)
_RENEWABLE = (  # FastChat's example, which v0 begins with
    "###Human: What are the key differences between renewable and non-renewable energy sources?###Assistant: Renewable energy sources are "
    "those that can be replenished naturally in a relatively short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, and natural gas. Here "
    "are some key differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are finite and will "
    "eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable sources, which can lead "
    "to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower operational costs than "
    "non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than non-renewable "
    "sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and needs, while "
    "non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources are not, and their "
    "depletion can lead to economic and social instability.\n"
)
_HI = "###Human: Hi!###Assistant: Hi there!  How can I help you today?\n"


def _separated(system: str, **more) -> Conversation:
    return Conversation(f"{system}###Human: ", "Human: ", "###Assistant:", end="###", eos=False, stop="###", **more)


def _ended(system: str, **more) -> Conversation:
    return Conversation(f"{system} USER: ", "USER: ", " ASSISTANT:", **more)


def _bracketed(system: str, bos: bool) -> Conversation:
    told = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return Conversation(f"[INST] {told}", "[INST] ", " [/INST]", end=" ", bos=bos)


_TAGS = ("<Image>", "</Image>")
_V1 = _ended(_USER)
CONVERSATIONS: dict[str, Conversation] = {
    "llava": _V1,
    "v0": _separated(_HUMAN + _RENEWABLE),
    "v0_mmtag": _separated(_TAGGED, image=_TAGS),
    "v0_train": Conversation(
        f"{_HUMAN}\n\n### Human: ", "Human: ", "\n### Assistant:", end="\n### ", eos=False, stop="###", place="data"
    ),
    "v1": _V1,
    "v1_mmtag": _ended(_TAGGED, image=_TAGS),
    "llava_v0": _separated(_HUMAN),
    "llava_v1": _ended(_HUMAN),
    "llama_2": _bracketed(_SAFE, bos=True),
    "llava_llama_2": _bracketed(_SEES, bos=True),
    "mistral_instruct": _bracketed("", bos=False),
    "simple": _separated(_HUMAN + _HI, place="after"),
    "multimodal": _separated(_MED.format("") + _HI, place="after"),
    "llava_med_v1": _ended(_MED.format("research ")),
}
