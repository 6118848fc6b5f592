# ruff: noqa: E501, ISC004, RUF001
"""Chat templates with the structure of published ones, and conversations under each, written by hand.

``«`` and ``»`` mark the text that the model wrote. A conversation has more than one text if the template shows an
earlier answer in another form than the model wrote it.
"""

from __future__ import annotations

from support.template_parts import THINK, Published, chatml, cohere, deepseek, jinja, llama3

_CHATML = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»\n"
    "<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n«Fine.<|im_end|>»"
)
_IM = ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
_LLAMA3 = ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
_TURNS3 = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd you?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Fine.<|eot_id|>»"
)
_COHERE = (
    "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|START_RESPONSE|>", "<|END_RESPONSE|>",
)  # fmt: skip
_DEEPSEEK = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_HARMONY = ("<|return|>", "<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>")


_BARE = "m.content.split('</think>')[-1]"
# The thought of an answer, from a key of its own or from the text.
_THOUGHT = (
    "(m.reasoning_content or (m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n')"
    " if '</think>' in m.content else ''))"
)
_SAID = f"{_BARE}.lstrip('\\n')"
_SHOWN = f"'<think>\\n' + {_THOUGHT} + '\\n</think>\\n\\n' + {_SAID}"

_COMMAND_USER = "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
_COMMAND = (
    "<BOS_TOKEN>" + _COMMAND_USER.format("Hi") + "«<|START_RESPONSE|>Hello.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>»"
    "" + _COMMAND_USER.format("And you?") + "«<|START_RESPONSE|>Fine.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>»"
)
_ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_HI, _AND = _ASKED.format("Hi"), _ASKED.format("And you?")
_BOS, _EOS = _DEEPSEEK[1], _DEEPSEEK[0]
_SEEK_HI, _SEEK_AND = f"{_BOS}<｜User｜>Hi<｜Assistant｜>", "<｜User｜>And you?<｜Assistant｜>"
_OSS = "<|start|>system<|message|>You are ChatGPT.<|end|>"
_OSS_HI, _OSS_AND = (f"<|start|>user<|message|>{said}<|end|><|start|>assistant" for said in ("Hi", "And you?"))
_SAID_BEFORE = "<|channel|>final<|message|>Hello.<|end|>"
_NANO_HI, _NANO_AND = (f"<SPECIAL_11>User\n{said}\n<SPECIAL_11>Assistant\n" for said in ("Hi", "And you?"))
_SUPER_HI, _SUPER_AND = (
    f"<|start_header_id|>user<|end_header_id|>\n\n{said}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    for said in ("Hi", "And you?")
)
_SUPER = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"

PUBLISHED = {
    "ChatML": Published(chatml(), _IM, "bytes", {"plain": (_CHATML,), "tagged": (
        _HI + "«<think>\nHm.\n</think>\n\nHello.<|im_end|>»\n" + _AND + "«<think>\nOh.\n</think>\n\nFine.<|im_end|>»",
    )}),
    "Llama 2": Published(
        jinja("bos_token + '[INST] ' + m.content + ' [/INST]'", "' ' + m.content + ' ' + eos_token", "''"),
        ("</s>", "<s>"), "pieces",
        {"plain": ("<s>[INST] Hi [/INST]« Hello. </s>»<s>[INST] And you? [/INST]« Fine. </s>»",)},
    ),
    "Llama 3": Published(llama3(), _LLAMA3, "bytes", {"plain": ("<|begin_of_text|>" + _TURNS3,)}),
    # The template ends a whole text with one more token, which the model doesn't write.
    "Llama 3, first release": Published(
        llama3(end="eos_token"), ("<|end_of_text|>", *_LLAMA3[1:4], "<|eot_id|>"), "bytes",
        {"plain": ("<|begin_of_text|>" + _TURNS3,)},
    ),
    "Llama 3.1": Published(
        llama3(start="bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023"
                "\\nToday Date: 26 Jul 2024\\n\\n<|eot_id|>'", answer="m.content | trim"),
        _LLAMA3, "bytes",
        {"plain": ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
                   "Today Date: 26 Jul 2024\n\n<|eot_id|>" + _TURNS3,)},
    ),
    "Mistral v1": Published(
        jinja("'[INST] ' + m.content + ' [/INST]'", "m.content + eos_token + ' '", "''", start="bos_token"),
        ("</s>", "<s>"), "pieces",
        {"plain": ("<s>[INST] Hi [/INST]«Hello.</s>» [INST] And you? [/INST]«Fine.</s>»",)},
    ),
    "Mistral v3": Published(
        jinja("'[INST] ' + m.content + '[/INST]'", "' ' + m.content + eos_token", "''", start="bos_token"),
        ("</s>", "<s>", "[INST]", "[/INST]"), "pieces",
        {"plain": ("<s>[INST] Hi[/INST]« Hello.</s>»[INST] And you?[/INST]« Fine.</s>»",)},
    ),
    "Mistral Tekken": Published(
        jinja("'[INST]' + m.content + '[/INST]'", "m.content + eos_token", "''", start="bos_token"),
        ("</s>", "<s>", "[INST]", "[/INST]"), "bytes",
        {"plain": ("<s>[INST]Hi[/INST]«Hello.</s>»[INST]And you?[/INST]«Fine.</s>»",)},
    ),
    "Gemma": Published(
        jinja("'<start_of_turn>user\\n' + m.content | trim + '<end_of_turn>\\n'",
               "'<start_of_turn>model\\n' + m.content | trim + '<end_of_turn>\\n'", "'<start_of_turn>model\\n'",
               start="bos_token"),
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "bare pieces",
        {"plain": ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Hello.<end_of_turn>»\n"
                   "<start_of_turn>user\nAnd you?<end_of_turn>\n<start_of_turn>model\n«Fine.<end_of_turn>»",)},
    ),
    "Phi-3": Published(
        jinja("'<|user|>\\n' + m.content + '<|end|>\\n'", "'<|assistant|>\\n' + m.content + '<|end|>\\n'",
               "'<|assistant|>\\n'", end="eos_token"),
        ("<|endoftext|>", "<s>", "<|user|>", "<|assistant|>", "<|end|>"), "pieces",
        {"plain": ("<|user|>\nHi<|end|>\n<|assistant|>\n«Hello.<|end|>»\n"
                   "<|user|>\nAnd you?<|end|>\n<|assistant|>\n«Fine.<|end|>»",)},
    ),
    "Phi-4": Published(
        jinja("'<|im_start|>user<|im_sep|>' + m.content + '<|im_end|>'",
               "'<|im_start|>assistant<|im_sep|>' + m.content + '<|im_end|>'", "'<|im_start|>assistant<|im_sep|>'"),
        (*_IM, "<|im_sep|>"), "bytes",
        {"plain": ("<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>«Hello.<|im_end|>»"
                   "<|im_start|>user<|im_sep|>And you?<|im_end|><|im_start|>assistant<|im_sep|>«Fine.<|im_end|>»",)},
    ),
    "Zephyr": Published(
        jinja("'<|user|>\\n' + m.content + eos_token + '\\n'", "'<|assistant|>\\n' + m.content + eos_token + '\\n'",
               "'<|assistant|>\\n'"),
        ("</s>", "<s>"), "pieces",
        {"plain": ("<|user|>\nHi</s>\n<|assistant|>\n«Hello.</s>»\n<|user|>\nAnd you?</s>\n<|assistant|>\n«Fine.</s>»",)},
    ),
    "Vicuna": Published(
        jinja("'USER: ' + m.content + ' '", "'ASSISTANT: ' + m.content + eos_token", "'ASSISTANT:'",
               start="bos_token + 'A chat. '"),
        ("</s>", "<s>"), "pieces",
        {"plain": ("<s>A chat. USER: Hi ASSISTANT:« Hello.</s>»USER: And you? ASSISTANT:« Fine.</s>»",)},
    ),
    "Alpaca": Published(
        jinja("'### Instruction:\\n' + m.content + '\\n\\n'", "'### Response:\\n' + m.content + '\\n\\n'",
               "'### Response:\\n'", start="bos_token"),
        ("</s>", "<s>"), "pieces",
        {"plain": ("<s>### Instruction:\nHi\n\n### Response:\n«Hello.»\n\n"
                   "### Instruction:\nAnd you?\n\n### Response:\n«Fine.»",)},
    ),
    "SOLAR": Published(
        jinja("'### User:\\n' + m.content + '\\n\\n'", "'### Assistant:\\n' + m.content + '\\n\\n'",
               "'### Assistant:\\n'"),
        ("</s>", "<s>"), "pieces",
        {"plain": ("### User:\nHi\n\n### Assistant:\n«Hello.»\n\n### User:\nAnd you?\n\n### Assistant:\n«Fine.»",)},
    ),
    "Command R": Published(
        cohere(), _COHERE, "bytes",
        {"plain": (_COMMAND.replace("<|START_RESPONSE|>", "").replace("<|END_RESPONSE|>", ""),)},
    ),
    "Command A": Published(
        cohere(before="<|START_RESPONSE|>", behind="<|END_RESPONSE|>"), _COHERE, "bytes", {"plain": (_COMMAND,)}
    ),
    # The template always opens the next answer, whether asked or not.
    "Command R7B": Published(
        cohere(before="<|START_RESPONSE|>", behind="<|END_RESPONSE|>",
                end="'<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'"),
        _COHERE, "bytes", {"plain": (_COMMAND,)},
    ),
    "DeepSeek V2": Published(
        jinja("'User: ' + m.content + '\\n\\n'", "'Assistant: ' + m.content + eos_token", "'Assistant:'",
               start="bos_token"),
        _DEEPSEEK[:2], "bytes",
        {"plain": (f"{_BOS}User: Hi\n\nAssistant:« Hello.{_EOS}»User: And you?\n\nAssistant:« Fine.{_EOS}»",)},
    ),
    "DeepSeek V3": Published(deepseek(), _DEEPSEEK, "bytes", {
        "plain": (f"{_SEEK_HI}«Hello.{_EOS}»{_SEEK_AND}«Fine.{_EOS}»",),
        "tagged": (f"{_SEEK_HI}«<think>\nHm.\n</think>\n\nHello.{_EOS}»"
                   f"{_SEEK_AND}«<think>\nOh.\n</think>\n\nFine.{_EOS}»",),
    }, THINK),
    "DeepSeek R1, first release": Published(deepseek(answer=_BARE), _DEEPSEEK, "bytes", {
        "plain": (f"{_SEEK_HI}«Hello.{_EOS}»{_SEEK_AND}«Fine.{_EOS}»",),
        "tagged": (f"{_SEEK_HI}«<think>\nHm.\n</think>\n\nHello.{_EOS}»",
                   f"{_SEEK_HI}\n\nHello.{_EOS}{_SEEK_AND}«<think>\nOh.\n</think>\n\nFine.{_EOS}»"),
    }, THINK),
    "DeepSeek R1 and its distillations": Published(deepseek(answer=_BARE, opening="<think>\\n"), _DEEPSEEK, "bytes", {
        "plain": (f"{_SEEK_HI}«Hello.{_EOS}»{_SEEK_AND}«Fine.{_EOS}»",),
        **dict.fromkeys(("tagged", "opened"), (
            f"{_SEEK_HI}<think>\n«Hm.\n</think>\n\nHello.{_EOS}»",
            f"{_SEEK_HI}\n\nHello.{_EOS}{_SEEK_AND}<think>\n«Oh.\n</think>\n\nFine.{_EOS}»",
        )),
    }, THINK),
    "DeepSeek V3.1": Published(
        deepseek(answer="m.content.split('</think>', 1)[-1]", before="</think>", opening="</think>"),
        _DEEPSEEK, "bytes", {
            "plain": (f"{_SEEK_HI}</think>«Hello.{_EOS}»{_SEEK_AND}</think>«Fine.{_EOS}»",),
            "tagged": (f"{_SEEK_HI}</think>«\n\nHello.{_EOS}»{_SEEK_AND}</think>«\n\nFine.{_EOS}»",),
        }, THINK),
    "Qwen2.5": Published(
        chatml(start="'<|im_start|>system\\nYou are Qwen.<|im_end|>\\n'"), _IM, "bytes",
        {"plain": ("<|im_start|>system\nYou are Qwen.<|im_end|>\n" + _CHATML,)},
    ),
    "Qwen3": Published(chatml(answer=f"({_SHOWN} if loop.last else {_SAID})"), _IM, "bytes", {
        "plain": (_HI + "«<think>\n\n</think>\n\nHello.<|im_end|>»",
                  _HI + "Hello.<|im_end|>\n" + _AND + "«<think>\n\n</think>\n\nFine.<|im_end|>»"),
        **dict.fromkeys(("tagged", "opened", "keyed"), (
            _HI + "«<think>\nHm.\n</think>\n\nHello.<|im_end|>»",
            _HI + "Hello.<|im_end|>\n" + _AND + "«<think>\nOh.\n</think>\n\nFine.<|im_end|>»",
        )),
    }, THINK),
    "Qwen3.5": Published(
        chatml(answer=f"({_SHOWN})", opening="'<|im_start|>assistant\\n<think>\\n'"), _IM, "bytes", {
            # The prompt's line break is a token of its own. In a text that is only a prompt, two breaks are one token.
            "plain": (_HI + "<think>\n«\n</think>\n\nHello.<|im_end|>»",
                      _HI + "<think>\n\n</think>\n\nHello.<|im_end|>\n" + _AND
                      + "<think>\n«\n</think>\n\nFine.<|im_end|>»"),
            **dict.fromkeys(("tagged", "opened", "keyed"), (
                _HI + "<think>\n«Hm.\n</think>\n\nHello.<|im_end|>»\n" + _AND
                + "<think>\n«Oh.\n</think>\n\nFine.<|im_end|>»",
            )),
        }, THINK),
    "QwQ": Published(
        chatml(answer=_SAID, opening="'<|im_start|>assistant\\n<think>\\n'"), _IM, "bytes", {
            "plain": (_CHATML,),
            **dict.fromkeys(("tagged", "opened"), (
                _HI + "<think>\n«Hm.\n</think>\n\nHello.<|im_end|>»",
                _HI + "Hello.<|im_end|>\n" + _AND + "<think>\n«Oh.\n</think>\n\nFine.<|im_end|>»",
            )),
        }, THINK),
    "gpt-oss": Published(
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{{ '<|start|>system<|message|>You are ChatGPT.<|end|>' }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% else %}"
        "{% if '<|channel|>' in m.content %}{{ raise_exception('a message contains channel tags') }}{% endif %}"
        "{% if loop.last and not add_generation_prompt %}{% if 'thinking' in m %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{% else %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        _HARMONY, "bytes", {
            "plain": (_OSS + _OSS_HI + "«<|channel|>final<|message|>Hello.<|return|>»",
                      _OSS + _OSS_HI + _SAID_BEFORE + _OSS_AND + "«<|channel|>final<|message|>Fine.<|return|>»"),
            "keyed": (_OSS + _OSS_HI + "«<|channel|>analysis<|message|>Hm.<|end|>"
                      "<|start|>assistant<|channel|>final<|message|>Hello.<|return|>»",
                      _OSS + _OSS_HI + _SAID_BEFORE + _OSS_AND + "«<|channel|>analysis<|message|>Oh.<|end|>"
                      "<|start|>assistant<|channel|>final<|message|>Fine.<|return|>»"),
        }),
    "Nemotron Nano 2": Published(
        jinja("'<SPECIAL_11>User\\n' + m.content | trim + '\\n'",
               "('<SPECIAL_11>Assistant\\n<think>\\n\\n' + m.content | trim if loop.last and not add_generation_prompt "
               f"else '<SPECIAL_11>Assistant\\n' + {_BARE} | trim) + '\\n<SPECIAL_12>\\n\\n'",
               "'<SPECIAL_11>Assistant\\n<think>\\n\\n'", start="'<SPECIAL_10>System\\n\\n\\n'"),
        ("<SPECIAL_12>", "<s>", "<SPECIAL_10>", "<SPECIAL_11>"), "bytes", {
            "plain": ("<SPECIAL_10>System\n\n\n" + _NANO_HI + "<think>\n\n«Hello.\n<SPECIAL_12>»",
                      "<SPECIAL_10>System\n\n\n" + _NANO_HI + "Hello.\n<SPECIAL_12>\n\n" + _NANO_AND
                      + "<think>\n\n«Fine.\n<SPECIAL_12>»"),
            **dict.fromkeys(("tagged", "opened"), (
                "<SPECIAL_10>System\n\n\n" + _NANO_HI + "<think>\n\n«Hm.\n</think>\n\nHello.\n<SPECIAL_12>»",
                "<SPECIAL_10>System\n\n\n" + _NANO_HI + "Hello.\n<SPECIAL_12>\n\n" + _NANO_AND
                + "<think>\n\n«Oh.\n</think>\n\nFine.\n<SPECIAL_12>»",
            )),
        }, THINK),
    "Llama Nemotron Super": Published(
        llama3(start="bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n<|eot_id|>'",
                answer=f"{_BARE}.lstrip()"),
        _LLAMA3, "bytes", {
            "plain": (_SUPER + _TURNS3,),
            "tagged": (_SUPER + _SUPER_HI + "«<think>\nHm.\n</think>\n\nHello.<|eot_id|>»",
                       _SUPER + _SUPER_HI + "Hello.<|eot_id|>" + _SUPER_AND
                       + "«<think>\nOh.\n</think>\n\nFine.<|eot_id|>»"),
        }),
    "Granite 3": Published(
        jinja("'<|start_of_role|>user<|end_of_role|>' + m.content + '<|end_of_text|>\\n'",
               "'<|start_of_role|>assistant<|end_of_role|>' + m.content + '<|end_of_text|>\\n'",
               "'<|start_of_role|>assistant<|end_of_role|>'"),
        ("<|end_of_text|>", "<s>", "<|start_of_role|>", "<|end_of_role|>"), "bytes",
        {"plain": ("<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
                   "«Hello.<|end_of_text|>»\n<|start_of_role|>user<|end_of_role|>And you?<|end_of_text|>\n"
                   "<|start_of_role|>assistant<|end_of_role|>«Fine.<|end_of_text|>»",)},
    ),
    "OLMo 2": Published(
        jinja("'<|user|>\\n' + m.content + '\\n'",
               "'<|assistant|>\\n' + m.content + eos_token + ('' if loop.last else '\\n')", "'<|assistant|>\\n'",
               start="bos_token"),
        ("<|endoftext|>", "<|endoftext|>"), "bytes",
        {"plain": ("<|endoftext|><|user|>\nHi\n<|assistant|>\n«Hello.<|endoftext|>»\n"
                   "<|user|>\nAnd you?\n<|assistant|>\n«Fine.<|endoftext|>»",)},
    ),
    "SmolLM2": Published(
        chatml(start="'<|im_start|>system\\nYou are SmolLM.<|im_end|>\\n'"), _IM, "bytes",
        {"plain": ("<|im_start|>system\nYou are SmolLM.<|im_end|>\n" + _CHATML,)},
    ),
    "SmolLM3": Published(chatml(answer="m.content.lstrip('\\n')"), _IM, "bytes", {
        "plain": (_CHATML,),
        "tagged": (_HI + "«<think>\nHm.\n</think>\n\nHello.<|im_end|>»\n" + _AND
                   + "«<think>\nOh.\n</think>\n\nFine.<|im_end|>»",),
    }, THINK),
    "SmolLM3 without thoughts": Published(
        chatml(answer="'<think>\\n\\n</think>\\n' + m.content.lstrip('\\n')",
                opening="'<|im_start|>assistant\\n<think>\\n\\n</think>\\n'"),
        _IM, "bytes", {"plain": (_HI + "<think>\n\n</think>\n«Hello.<|im_end|>»\n" + _AND
                                 + "<think>\n\n</think>\n«Fine.<|im_end|>»",)}, THINK),
    "LFM2": Published(
        chatml(start="bos_token"), ("<|im_end|>", "<|startoftext|>", "<|im_start|>"), "bytes",
        {"plain": ("<|startoftext|>" + _CHATML,)},
    ),
    "LFM2.5": Published(
        chatml(start="bos_token",
                answer="(('<think>' + m.thinking + '</think>' if m.thinking is defined else '') + m.content if loop.last "
                       f"else {_BARE} | trim)"),
        ("<|im_end|>", "<|startoftext|>", "<|im_start|>"), "bytes", {
            "plain": ("<|startoftext|>" + _CHATML,),
            "tagged": ("<|startoftext|>" + _HI + "«<think>\nHm.\n</think>\n\nHello.<|im_end|>»",
                       "<|startoftext|>" + _HI + "Hello.<|im_end|>\n" + _AND
                       + "«<think>\nOh.\n</think>\n\nFine.<|im_end|>»"),
            "keyed": ("<|startoftext|>" + _HI + "«<think>Hm.</think>Hello.<|im_end|>»",
                      "<|startoftext|>" + _HI + "Hello.<|im_end|>\n" + _AND + "«<think>Oh.</think>Fine.<|im_end|>»"),
        }, THINK),
    "Yi": Published(chatml(), _IM, "pieces", {"plain": (_CHATML,)}),
    "InternLM2": Published(
        chatml(start="bos_token"), ("</s>", "<s>", "<|im_start|>", "<|im_end|>"), "pieces",
        {"plain": ("<s>" + _CHATML,)},
    ),
    "StarCoder2 Instruct": Published(
        jinja("'### Instruction\\n' + m.content + '\\n\\n'", "'### Response\\n' + m.content + eos_token",
               "'### Response\\n'", start="bos_token + 'You write code.\\n\\n'"),
        ("<|endoftext|>", "<|endoftext|>"), "bytes",
        {"plain": ("<|endoftext|>You write code.\n\n### Instruction\nHi\n\n### Response\n«Hello.<|endoftext|>»"
                   "### Instruction\nAnd you?\n\n### Response\n«Fine.<|endoftext|>»",)},
    ),
    "OpenChat": Published(
        jinja("'GPT4 Correct User: ' + m.content + '<|end_of_turn|>'",
               "'GPT4 Correct Assistant: ' + m.content + '<|end_of_turn|>'", "'GPT4 Correct Assistant:'",
               start="bos_token"),
        ("<|end_of_turn|>", "<s>"), "pieces",
        {"plain": ("<s>GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant:« Hello.<|end_of_turn|>»"
                   "GPT4 Correct User: And you?<|end_of_turn|>GPT4 Correct Assistant:« Fine.<|end_of_turn|>»",)},
    ),
    "Falcon": Published(
        jinja("'User: \\n' + m.content + '\\n'", "'Falcon:\\n' + m.content + '\\n'", "'Falcon:'"),
        ("<|endoftext|>",), "bytes",
        {"plain": ("User: \nHi\nFalcon:«\nHello.»\nUser: \nAnd you?\nFalcon:«\nFine.»",)},
    ),
    "Kimi K2": Published(
        jinja("'<|im_user|>user<|im_middle|>' + m.content + '<|im_end|>'",
               "'<|im_assistant|>assistant<|im_middle|>' + m.content + '<|im_end|>'",
               "'<|im_assistant|>assistant<|im_middle|>'"),
        ("<|im_end|>", "[BOS]", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"), "bytes",
        {"plain": ("<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>«Hello.<|im_end|>»"
                   "<|im_user|>user<|im_middle|>And you?<|im_end|>"
                   "<|im_assistant|>assistant<|im_middle|>«Fine.<|im_end|>»",)},
    ),
    "GLM-4": Published(
        jinja("'<|user|>\\n' + m.content", "'<|assistant|>\\n' + m.content", "'<|assistant|>'",
               start="'[gMASK]<sop>'"),
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"), "bytes",
        {"plain": ("[gMASK]<sop><|user|>\nHi<|assistant|>«\nHello.»<|user|>\nAnd you?<|assistant|>«\nFine.»",)},
    ),
}  # fmt: skip
