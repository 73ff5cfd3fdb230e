"""The wordings that tests pin: an edit of a message is an edit here, and at no test.

A test names the message that it triggers, and gives the values that the message must have::

    with pytest.raises(SidelightError, match=wordings.TOO_FEW_LABELLED.format(got=29)):

They are regular expressions of the part that says which error it is, or what to do. Options,
settings and paths may stand in a test by themselves: they are the interface. ``test_wordings``
checks that nothing else does.
"""

# Names
DID_YOU_MEAN = "Did you mean '{name}'"
DISTINCT_NAMES = "distinct names"
NAME_OF_PROBE = "Use 1 to 64 of"
UNKNOWN_LABEL = r"unknown label '{label}'\."
UNKNOWN_MECHANISM = "Unknown mechanism '{name}'"

# Where a text stands
FILE_LINE = "{file}, line {line}"
ROW = "Given rows, row {row}"

# Files, packages and settings
CANNOT_LOAD = "Cannot load.*{name}"
CANNOT_WRITE = "Cannot write.* {what}"
CHECK_NETWORK = "Check the name, the network"
HOW_TO_INSTALL = "run `pip install '{package}'`"
NOT_INSTALLED = "is not installed"
NOT_JSON = "not JSON serializable"
NO_FILE = "No file {path}"
FOLDER_DIFFERS = "Name another folder"
SETTING_IS = "{name} is {value}"
SETTING_IS_ABSENT = "{name} is not set"
SET_VARIABLE = "set {name}"
SEVERAL_HAVE = "Several packages provide '{name}' .*Uninstall"

# Rows and labels
CANNOT_SPLIT = "cannot be split into {folds} folds"
HAS_MESSAGES = "has {messages} messages"
NO_COLUMN = "no column '{name}'"
NO_LABELS = "no labels"
COLUMNS_DIFFER = "labels {labels}, but the columns are {columns}"
POSITIVE_GUESSED = "No positive class was named, so '{label}' is used"
ROW_EACH = r"Give each message a row of its own\.$"
ROW_HOLDS = "row {row}: column '{name}' holds {cell}"
SAME_RESPONSE = "and the same response"
SAME_TEXT = "all of them have the same text"
TOO_FEW_DISTINCT = "Too few distinct texts to hold some of each"
TOO_FEW_FOR_LABELS = "{examples} examples are too few to contain all {labels} labels"
TRAINED_ON = "{seen} of {texts} texts were used in training"
UNLABELLED = r"{missing} of {rows} rows have no label .* row {first}\."
EXPECTED_ONE_OF = "expected one of {labels}"

# Spans
IGNORE_WITHOUT_SPANS = "labels no spans, so 'ignore' would never apply"
FINDS_IN_PROMPTS = "finds spans in prompts"
LABELS_NO_SPANS = "labels no spans"
LABELS_TEXTS = "'{probe}' labels whole texts"
LOAD_SPANS = r"no spans\. Load them with load_examples"
NO_SPANS_AT_ALL = "No text has a span"
NO_SPAN_RULE = "invalid values of spans|labels no tokens"
SPANS_OF_PROMPTS = "in each prompt.*would read: response"
WANTS_TOKEN_LABELS = r"labels tokens, such as 'spans' \(got: '{got}'\)"

# Texts, turns and lengths
AT_MOST_TOKENS = r"at most {tokens}\. Shorten"
BETWEEN_TURNS = "writes between turns"
CONTROL_TOKEN = "name of a control token"
GIVE_A_LIST = "takes a list of texts"
HALF_A_CHARACTER = "half a character"
NO_MESSAGE = "at least one message"
NO_RESPONSES = "reads responses, but {missing} of {texts} texts have none"
NO_ROOM_FOR_TEXT = "leaves no room for the text"
SHORTEN = "Shorten it"
TEMPLATE_REFUSES = "template refuses this conversation"
TEMPLATE_TOO_LONG = "template and the system prompt .* shorten"
TEXTS_CUT = "were truncated to {tokens} tokens"
TEXT_HAS = "{place}: The text has .* at most {limit}"
TOO_MANY_CHARACTERS = "characters, of which a token has at most"
UNEQUAL_LISTS = "Got {texts} texts but {responses} responses"
UNKNOWN_TOKEN = "token id {token}, but the model's ids are below {limit}"

# Models and devices
ADAPTER = "adapter_config.*changes the weights.*Merge it"
ARCHITECTURE = "the architecture {name}"
DIFFER_IN = "differ in {fields}"
DOES_NOT_FIT = "does not fit into memory"
LACKS_OPERATION = "lacks {name} on this device. Use"
LAYERS_OF_KIND = "layers of kind {kind}, .* another engine"
NAME_A_MODEL = "Give 'smollm2', a folder"
NO_BLOCKS = "{model} has no list of {count} decoder blocks"
NO_WEIGHTS = "no model.safetensors .* Save the model again"
PRETENDED_DEVICE = "one device|cannot draw"
TRAIN_ON_THIS = "Train the probe"
WEIGHTS_TAKE = "its weights take"
WEIGHTS_TWICE = "two different weights '{name}'"
WRONG_INDEX = "not a valid index of the files in its folder"

# Hidden states
NO_DISK_FOR_STATES = "may be used.*SIDELIGHT_CACHE.*fewer rows"
STATES_MISSING = "hidden states are missing"
STATES_NOT_FINITE = "Text {text} .* layer {layer} .* {dtype}"
STATES_UNREADABLE = "Cannot read .*Delete .*again"

# Training and its thresholds
CANNOT_CALIBRATE = "Cannot fit a {kind} calibration"
CANNOT_CONTINUE = "Cannot resume training from .* Delete it"
MIXED_CONTEXTS = "every label is on all of them or on none"
PREDICTS_MOST_PROBABLE = "predicts the most probable one"
ONE_SET_WITH_SPANS = "Load both with spans, or both without"
NO_THRESHOLD = "Leave --threshold out"
ROWS_OF_BOTH = "rows of both classes are needed"
RUN_DIVERGED = "'{mechanism}' with seed {seed} diverged.* Lower the learning rate"
TOO_FEW_LABELLED = "Too few labelled texts.*got {got}"
TOO_FEW_TO_TRAIN = r"got {got} .*at least {each} of each label and {all} in all"
TOO_FEW_OF_CLASS = r"got {got}, {found} of them '{label}'\. At least .* {wanted} with"
TOO_MANY_LAYERS = "layers to at most {layers}"
TRAINED_ON_THESE = "was trained on these texts.*new traffic"

# Judges
NEITHER_WORD = "neither of its words"

# Verdicts of probes
ACCEPTS_COPY = "{name}=[0-9a-f]+ accepts"
GIVES_NO_VERDICT = "gives no verdict"
LOGITS_NOT_FINITE = "NaN or infinite logits"
NOT_FINITE = "'{probe}' gave a logit that is not finite"
NOT_OF_PLAIN_TEXT = "cannot classify plain text"
NO_PROBES = "one or more probes"
TENSORS_DIFFER = "do not fit the mechanism '{mechanism}'|mean or scale is not"
OVERFLOW = "so large that sums overflow"
OVERFLOWED = "overflowed"

# Guards
NAME_ONE = "Name one of them here"
NO_ROW_BESIDE = "None of your {rows} rows for the guard has"
TWO_GUARDS = "names two guards"
UNTRAINED_GUARD = "'{name}' has not been .* {model}"
WRONG_PACKAGE = "package '{name}' of .*{why}.* Fix the package or unin"

# Policies and servers
BLOCKED_BY = "blocked by {probe}"
CANNOT_HOLD = "cannot hold there"
JUDGES_ITSELF = "where this server listens itself"
NO_TURNS = "'{probe}' cannot have turns .* {got}"
QUEUE_FULL = "{waiting} waiting, the limit is {limit}"

# Engines
INSTALL_ENGINE = "install and use the engine {engine}"
NO_ENGINE = "No engine '{name}' "
ONLY_CLASSIFIES = "only classifies"
RUNS_ONLY_IN = "runs only in {engine}, not in {another}"

# vLLM
CACHE_FORGETS = "all layers of this model discard some"
CANNOT_TAP = "does not know how to tap {name}"
CHECK_TYPES = "Check their types"
JUST_REPLACED = "just been replaced"
NOT_CHECKED = "not checked"
NOT_TOGETHER = "served together|of raw texts"
NO_BEAMS = "beam search"
NO_POOLINGS = "Poolings"
NO_VERDICT = "no verdict"
OFFLINE_ONLY = "only offline"
PROBES_DIFFER = "The probes changed during the request"
VLLM_DIFFERS = "This is vLLM {version}"
PLUGIN_UNCONFIGURED = "has {name}, but .*Set SIDELIGHT_PROJECTIONS or"
POLICY_UNHEARD = "would not check it"
RESTART = "Restart the server"
RUN_PARITY = "parity PROBE .* --quantised"
STAGE_MISSING = "pipeline stage"
STILL_WRITTEN = "still being generated"
TESTED_VLLM = ", .* tested with {versions}"

# GGUF files
CACHE_DOES_NOT_FIT = "{texts} texts of {tokens} tokens"
CACHE_IN_SEGMENTS = "a text of {tokens} tokens.*classify it in parts"
CONTEXT_LENGTH = "tokens={asked}: .* context length of .* is {limit} tokens"
LAYOUT_DEFAULT = "gives {got} for {name} by default instead of {wanted}"
LAYOUT_SIZE = "writes {got} bytes .* instead of {wanted}"
NO_GGUF = "There is no file|Ollama has no model"
NO_OLLAMA_MODEL = "no model '{name}' in {folder}. Known: none"
NO_ROOM_FOR_WEIGHTS = "for the weights of .* smaller file"
NO_TOKENIZER = "{folder}' is not a tokenizer"
OLLAMA_FILE_MISSING = "file of 'ollama:mine' is missing"
OLLAMA_PULL = "ollama pull"
OLLAMA_WEIGHTS = "'ollama:mine' has .* a single file of weights"
TAKES_GB = r".* take 0\.0 GB"
WHEEL_BROKEN = r"cannot be imported\. Reinstall its wheel"

# Labelling
ALREADY_DECIDED = "has already been labelled"
CACHE_TOO_SMALL = "Raise it with --memory"
CRITERION_EMPTY = "criterion is empty"
CRITERION_TAB_DIFFERS = "Another tab has changed the criterion"
FILE_CHANGED = "Another program has changed"
PROBE_DECIDES = "decides between {labels}"
JUDGE_NOT_PASSED = "has not passed its check"
PROBE_READS = "reads {side}"
JUDGE_SILENT = "gave no answer to .*, and ask again"
JUDGE_WITHOUT_CRITERION = "asks about a criterion"
LABEL_NOT_SAVED = "not saved"
NO_CROSS_FIT = "not trained on labels"
TAB_DIFFERS = "Another tab"
TOO_FEW_OF_LABEL = "needs {count} texts of each label"

# The laboratory
ANSWERS_END_AT_ONCE = "ends its responses at once"
BASELINE_DIVERGED = r"Lower the learning rate \(it was {rate}\)"
BOTH_KINDS = "Add texts of both kinds"
DIVERGED = "diverged"
FEWER_BACKGROUND_TEXTS = "requested. Request fewer"
FEWER_LAYERS = "Set layers to at most {most}"
FEWER_ROWS = "fewer with --rows"
JUDGES_NO_TURNS = "each turn"
MODEL_READS = r"reads up to {tokens}\. .*--tokens"
NOT_A_PLAIN_HEAD = "from its head applied to its final norm"
NO_CHATS = "no chat template|no control tokens"
NO_ENCODER = "as an encoder"
NO_ROW_OF_CLASS = "of class '{label}'"
CONDITIONS_DIFFER = r"other conditions \({names}\)"
SEED_DIFFERS = "another seed"
VALIDATION_DIFFERS = "another validation set"
PROMPT_OF_TOKENS = "prompt of {tokens} tokens.*--tokens"
RECIPE_LOOPS = "'like' leads back to .*{file}"
REFERENCE_FIRST = "vllm reference"
TASK_HAS_LABELS = "{count} labels: {labels}"

# Other programs
CHECK_UNAVAILABLE = "check is unavailable"
LITELLM_CANNOT_CONNECT = "Generic Guardrail API failed: Cannot connect"
MESSAGE_BLOCKED = "Your message was blocked"

# Judges that are fitted to probes
FITTED_TO_ANOTHER = "was fitted to judge .* another model, profile or criterion"
JUDGE_ADDS_NOTHING = "The judge adds nothing"
JUDGE_ONLY_BETTER = "The judge alone would be better"
JUDGE_FEW_DEFERRED = "would be deferred; wanted"
JUDGE_GAINS = "of recall at 1 % false positives over the probe alone"
JUDGE_OF_ONE_LABEL = "says whether one label holds"
JUDGE_TOO_FEW = "Too few texts to fit a judge"
JUDGE_TRAINED_TEXTS = "too well to be fitted to a judge"
JUDGE_UNANSWERED = "no verdict on {missing} of"
NO_BACKGROUND_SHARE = "no record of background traffic, so a share"
