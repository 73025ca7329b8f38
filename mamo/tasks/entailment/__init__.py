"""Visual entailment (SNLI-VE): does a picture entail a sentence, contradict it, or neither?"""
