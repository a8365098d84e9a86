"""An example of a user's package: a decoder, registered with the auto classes of transformers."""

from transformers import AutoConfig, AutoModelForCausalLM

from wizard.model import WizardConfig, WizardForCausalLM

AutoConfig.register("wizard", WizardConfig)
AutoModelForCausalLM.register(WizardConfig, WizardForCausalLM)
