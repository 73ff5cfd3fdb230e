"""LiteLLM's proxy as a gateway of MCP: a guard on calls of tools, and on what they bring.

LiteLLM's generic guardrail knows no modes of MCP. This one adds them, for litellm_mcp.yaml.
"""

from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api import GenericGuardrailAPI
from litellm.types.guardrails import GuardrailEventHooks


class McpGuardrail(GenericGuardrailAPI):
    @classmethod
    def get_supported_event_hooks(cls):
        return [GuardrailEventHooks.pre_mcp_call, GuardrailEventHooks.post_mcp_call]

    async def apply_guardrail(self, inputs, request_data, input_type, logging_obj=None):
        # LiteLLM calls a tool's result a response, which probes of a model's answers would read.
        return await super().apply_guardrail(
            inputs=inputs, request_data=request_data, input_type="request", logging_obj=logging_obj
        )
