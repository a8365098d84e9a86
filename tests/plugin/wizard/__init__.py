"""A package as a user might have it: a decoder of its own, registered with the auto classes of transformers."""

from transformers import AutoConfig, AutoModelForCausalLM

from wizard.model import WizardConfig, WizardForCausalLM

AutoConfig.register("wizard", WizardConfig)
AutoModelForCausalLM.register(WizardConfig, WizardForCausalLM)
