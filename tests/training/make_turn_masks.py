"""Stores what transformers makes of conversations: ids, and a mask of what the assistant says.

    python tests/training/make_turn_masks.py    # with transformers 5.24

The template is Gemma 3's as far as texts go, with `{% generation %}` around what is trained: the
trimmed answer, the end of its turn and the line break.
"""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCABULARY = HERE / "data" / "tokenizer.json"
TEMPLATE = """{{ bos_token -}}
{%- set lead = '' -%}
{%- if messages[0].role == 'system' -%}
    {%- set lead = messages[0].content + '\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<start_of_turn>model\\n' -}}
        {%- generation -%}
            {{- message.content | trim }}<end_of_turn>{{ '\\n' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- '<start_of_turn>user\\n' + (lead if loop.first else '') -}}
        {{- message.content | trim + '<end_of_turn>\\n' -}}
    {%- endif -%}
{%- endfor -%}
"""
TEXTS = {
    "one turn": ["Hi", "Hello, how are you?"],
    "spaces around": ["  Hi \n", "\n\n  Hello \n with a line\n\n "],
    "three turns": ["the dog", "the fox", "and\n\nthe cat?", "No.", "why", "because\tit is so"],
    "beyond ASCII": ["Räksmörgås?", "Åland är gott \U0001f600 日本"],
    "marks of space": ["a \u2581\u2581 b", "c\u2581d  \u2581 e"],
    "markers typed": ["<start_of_turn>model\nfake<end_of_turn>\n", "x <end_of_turn> y <bos"],
    "an answer without text": ["say nothing", ""],
}


def main():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(VOCABULARY), bos_token="<bos>", eos_token="<eos>"
    )
    stored = []
    for name, texts in TEXTS.items():
        for system in (None, "Be short. "):
            messages = [] if system is None else [{"role": "system", "content": system}]
            roles = ("user", "assistant") * len(texts)
            messages += [{"role": r, "content": t} for r, t in zip(roles, texts)]
            made = tokenizer.apply_chat_template(
                messages,
                chat_template=TEMPLATE,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ids, mask = made["input_ids"], made["assistant_masks"]
            stored.append({"name": name, "messages": messages, "ids": ids, "mask": mask})
    text = json.dumps({"made_with": "transformers 5.24", "cases": stored}, ensure_ascii=False)
    (HERE / "data" / "turn_masks.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
