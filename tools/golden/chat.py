"""Makes tests/data/chat.json: conversations as Jinja2 writes them, set up as HF's transformers do.

    python tools/golden/chat.py          needs jinja2 from PyPI

The templates are written for the tests, each in the manner of a family of models.
"""

import json
import pathlib

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROOT = pathlib.Path(__file__).resolve().parents[2]



class Generation(Extension):
    """What transformers make of {% generation %} when they render: nothing but what stands in it."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


TEMPLATES = {
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "inst": """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set talk = messages[1:] %}
{%- else %}
    {%- set talk = messages %}
{%- endif %}
{{ bos_token }}
{%- for message in talk %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system is defined %}
            {{- '[INST] <<SYS>>\\n' + system.strip() + '\\n<</SYS>>\\n\\n' + message['content'].strip() + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'].strip() + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "headers": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined and false %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nDate: " + date_string + "\\n\\n" }}
{%- if tools is not none %}{{- "tools" }}{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
""",
    "namespace": """{% set ns = namespace(n=0, last=-1, text='') %}
{% for m in messages %}
  {% if m.role == 'system' %}
    {% continue %}
  {% endif %}
  {% set ns.n = ns.n + 1 %}
  {% set ns.last = loop.index0 %}
  {% set ns.text = ns.text ~ m.content.split('?')[0].rstrip() ~ '|' %}
  {% if ns.n > 2 %}
    {% break %}
  {% endif %}
{% endfor %}
n={{ ns.n }} last={{ ns.last }} text={{ ns.text }}
{% macro say(m, mark='-') %}
  {{ mark }} {{ m.role | upper }}: {{ m.content | replace('\\n', ' ') | trim }}
{% endmacro %}
{% for m in messages[::-1] %}
{{ say(m, mark='*' if loop.last else '-') }}
{% endfor %}
{# a comment #}
""",
    "json": "{% for m in messages %}{{ m.content | tojson }} {{ {'a': [1, 2.5, true, none], 'b': m.role} | tojson }}\n"
    "{{ {'k': [], 'l': [m.content, {}]} | tojson(indent=4, ensure_ascii=False) }}{% endfor %}{{ messages | length }} {{ messages | map(attribute='role') | join(',') }}",
    "generation": "{% for m in messages %}\n{%- if m.role == 'assistant' %}\n    {%- generation %}\n{{ m.content }}{% endgeneration -%}\n"
    "{% else %}\n  {% generation %}\n  [{{ m.content }}]\n  {% endgeneration %}\n{% endif %}\n{% endfor %}\r\n{{ 'generation' }} {% if true %}\r\nx{% endif %}",
    "tests": "{% for x in [none, 1, 'a', '', [], [1], {}, {'b': 1}, true, missing] %}{{ x is iterable }} {{ x is sequence }} "
    "{{ x is mapping }} {{ x is string }} {{ x is number }} {{ x is none }} {{ x is defined }}\n{% endfor %}"
    "{{ messages[1:] is sequence }} {{ range(3) is sequence }}"
    "{{ {'name': 'f', 'arguments': {'z': 1, 'a': 2}} | tojson }}{% for k in {'q': 1, 'b': 2} %}{{ k }}{% endfor %}",
    "methods": "{% for m in messages %}{{ m.content.lstrip().startswith(('Hi', 'W')) and 1 or 0 }}"
    "{{ m['role'].title() }}{{ m.get('name', 'nobody') }}{{ m.content[:5] }}{{ m.content[-3:] }}"
    "{{ m.items() | list | length }}{{ m.content.count('a') }}{{ m.content.find('a') }}{{ m.content.endswith('?') and 'y' }}\n{% endfor %}",
}

TALKS = [
    [],
    [["user", "Hi"]],
    [["system", " Be brief. \x01\x7f\t\\"], ["user", " What is <b>1 & 2</b>? "], ["assistant", "It's 'three'.\nOr \"3\".\n"], ["user", "h\u00e9 \u6f22 \U0001f600 {{ x }} {% y %} \\u003c"]],
    [["user", "a"], ["user", "b"]],
    [["system", "s"], ["user", "a\r\nb"], ["assistant", ""], ["user", "c"], ["assistant", "d"]],
]


def render(source, talk, prompt):
    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    messages = [{"role": role, "content": content} for role, content in talk]
    try:
        return environment.from_string(source).render(
            messages=messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
        )
    except TemplateError:
        return None


def main():
    cases = [
        {"template": name, "talk": number, "prompt": prompt, "text": render(source, talk, prompt)}
        for name, source in TEMPLATES.items()
        for number, talk in enumerate(TALKS)
        for prompt in (False, True)
    ]
    data = {"templates": TEMPLATES, "talks": TALKS, "cases": cases}
    (ROOT / "tests/data/chat.json").write_text(json.dumps(data, indent=1) + "\n")


main()
