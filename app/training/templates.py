"""Chat templates that can be chosen by name, where a model brings none or another one is wanted."""

from __future__ import annotations

from app.generation.template import DEFAULT_TEMPLATE

_INST = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = SYSTEM %}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ANSWER_SPACE + eos_token }}"
    "{% else %}{{ TURN_BOS + '[INST] ' + ns.system + m['content'] | trim + ' [/INST]' }}{% set ns.system = '' %}"
    "{% endif %}{% endfor %}"
)

NAMED: dict[str, str] = {
    "chatml": DEFAULT_TEMPLATE,
    "llama-2": _INST.replace("{{ bos_token }}", "", 1)
    .replace("SYSTEM", "'<<SYS>>\\n' + m['content'] | trim + '\\n<</SYS>>\\n\\n'")
    .replace("ANSWER_SPACE", "' '")
    .replace("TURN_BOS", "bos_token"),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
        "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": _INST.replace("SYSTEM", "m['content'] | trim + '\\n\\n'")
    .replace("ANSWER_SPACE", "''")
    .replace("TURN_BOS + '", "'"),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim + "
        "'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "phi-3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "vicuna": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}"
        "{% else %}{{ 'USER: ' + m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ '### Response:\\n' + m['content'] + eos_token + '\\n\\n' }}"
        "{% else %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
}
"""Name -> Jinja source."""
