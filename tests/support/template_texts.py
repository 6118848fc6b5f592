"""Chat templates as text."""

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\\n' ~ messages[0]['content'].strip() ~ '\\n<</SYS>>\\n\\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
TOOLS = """
{%- set ns = namespace(last=-1, count=0) %}
{{- 'Today: ' ~ strftime_now('%Y') ~ '\\n' }}
{% if tools %}
<tools>
{% for tool in tools %}
    {{ tool | tojson }}
{{ tool | tojson(indent=2, sort_keys=true) }}
{% endfor %}
</tools>
{% endif %}
{% for message in messages %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {% if message.role == 'end' %}{% break %}{% endif %}
    {% set ns.last = loop.index0 %}
    {% set ns.count = ns.count + 1 %}
    {% if message.role == 'assistant' %}
{% generation %}
{% set inside = 'kept' %}
{{ message.content if message.content is defined else message.tool_calls | tojson }}{{ eos_token }}
{% endgeneration %}
{{ inside | default('gone') }}
{% if message.reasoning_content is defined %}
<think>{{ message.reasoning_content }}|{{ message.thinking }}</think>
{% endif %}
    {% else %}
<{{ message.role }}>{{ message.content }}
    {% endif %}
{% endfor %}
{{- dict(a=ns.last, b=ns.count) | tojson }}{{ dict.fromkeys(['k'], 1) | tojson }}
{{- documents is none }} {{ enable_thinking | default('unset') }} {{ pad_token | default('no pad') }}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
