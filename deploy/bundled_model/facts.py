"""What the model can say about pagebus and about itself, and small talk: questions in several phrasings."""

from __future__ import annotations

# One entry: phrasings of the question, separated by "|", and the answers to choose from.
Fact = tuple[str, tuple[str, ...]]

PAGEBUS: tuple[Fact, ...] = (
    ("What is pagebus?|Tell me about pagebus.|Explain pagebus.|Describe pagebus.|pagebus?"
     "|What does pagebus do?"
     "|Can you explain what pagebus is?",
     ("pagebus serves large language models as asynchronous services: a gateway, a scheduler and an executor "
      "that meet on a NATS message bus.",)),
    ("What services does pagebus have?|Which services are there?|What are the parts of pagebus?"
     "|Name the services of pagebus.|What is pagebus made of?",
     ("pagebus has three services: the gateway, the scheduler and the executor. They meet on a NATS "
      "message bus.",)),
    ("What does the gateway do?|What is the gateway?|Explain the gateway.|What is the job of the gateway?",
     ("The gateway speaks HTTP and owns the text: chat templates, tokens in and out, and the streams to the "
      "clients.",)),
    ("What does the scheduler do?|What is the scheduler?|Explain the scheduler."
     "|What is the job of the scheduler?",
     ("The scheduler makes continuous batches and owns every block of the KV cache. It holds no tensors "
      "and no "
      "text.",)),
    ("What does the executor do?|What is the executor?|Explain the executor."
     "|What is the job of the executor?",
     ("The executor owns the tensors: the weights, the KV cache, the forward pass and the sampling.",)),
    ("What is NATS?|What is the bus?|What message bus does pagebus use?|Which bus does pagebus use?"
     "|How do the services talk to each other?",
     ("NATS is the message bus on which the services of pagebus meet.",)),
    ("What is PagedAttention?|Explain PagedAttention.|How does PagedAttention work?|What is paged attention?"
     "|Does pagebus use PagedAttention?",
     ("PagedAttention keeps the KV cache in blocks of 16 tokens, so that memory is handed out page by "
      "page.",)),
    ("How many tokens are in a block?|How big is a block?|What is the block size?|How large is a KV block?"
     "|What is the size of a block?",
     ("A block holds 16 tokens.",)),
    ("What is continuous batching?|Explain continuous batching.|How does batching work in pagebus?"
     "|Does pagebus do continuous batching?",
     ("Continuous batching lets requests join and leave the batch at every step, so that nobody waits for "
      "the "
      "slowest one.",)),
    ("Which port does pagebus use?|What port does pagebus listen on?|On which port is the API?"
     "|What is the port of the API?|What is the default port?",
     ("The API listens on port 8000.",)),
    ("Is pagebus compatible with OpenAI?|Which API does pagebus have?|Can I use the OpenAI SDK?"
     "|What API does pagebus speak?|Does pagebus speak the OpenAI API?",
     ("Yes: pagebus has an OpenAI-compatible API on port 8000.",)),
    ("How do I start pagebus?|How can I run pagebus?|How do I run pagebus?|What does pagebus serve do?"
     "|Which command starts pagebus?|What is the command to start pagebus?",
     ("Run pagebus serve. It starts everything on one machine, with an embedded NATS server and the bundled "
      "model.",)),
    ("What happens when a process dies?|What if the scheduler dies?|What if an executor crashes?"
     "|What if the gateway dies?|What happens when the bus dies?|Is pagebus fault tolerant?"
     "|What does pagebus promise?|What is the promise of pagebus?",
     ("Every accepted request is answered once, whatever process dies. The stream pauses and goes on.",)),
    ("Are tokens lost when something dies?|Can a token get lost?|Do I lose tokens after a crash?",
     ("No. A stream pauses and goes on, with no token lost, doubled or changed.",)),
    ("What is the licence of pagebus?|Which licence does pagebus have?|What license does pagebus use?"
     "|Is pagebus open source?|Under which license is pagebus?",
     ("pagebus is open source under the Apache-2.0 licence.",)),
    ("What is a plan?|What is a Plan message?|What does a plan say?|Explain plans.",
     ("A plan is a message from the scheduler to the executor. It lays out the next steps, and it is a "
      "lease.",)),
    ("What is a lease?|Why are plans leases?|Explain leases.",
     ("A plan is a lease: within it the executor goes on by itself, without waiting for the next message.",)),
    ("What is the horizon?|What is a horizon?|Explain the horizon.",
     ("The horizon is the number of steps that a plan lays out ahead.",)),
    ("What is a row?|Explain rows.|What does row mean in pagebus?",
     ("A row is one request and one choice. A request with n choices has n rows.",)),
    ("What is prefill?|Explain prefill.|What does prefill mean?",
     ("Prefill runs the tokens of the prompt through the model and fills the KV cache.",)),
    ("What is decode?|Explain decoding.|What does decode mean?",
     ("Decode makes one new token for each row at every step.",)),
    ("What is a KV cache?|What is the KV cache?|Explain the KV cache.",
     ("The KV cache keeps the keys and values of all tokens seen so far, so that they are computed only "
      "once.",)),
    ("What is the prefix cache?|What is prefix caching?|Explain prefix caching.|Does pagebus cache prefixes?",
     ("The prefix cache keeps full blocks of earlier prompts. A request with the same beginning uses them "
      "again.",)),
    ("What is a token?|What are tokens?|Explain tokens.",
     ("A token is a small piece of text, such as a word or a digit. The model reads and writes tokens.",)),
    ("What is the requester?|What is a requester?|Explain the requester.",
     ("The requester owns the truth about a request: its prompt, its parameters and the tokens received.",)),
    ("Who owns the blocks?|Who allocates the blocks?|Which service allocates blocks?",
     ("The scheduler owns every block.",)),
    ("Who owns the text?|Which service handles text?"
     "|Which service tokenizes?", ("The gateway owns the text.",)),
    ("Who owns the tensors?|Which service runs the model?|Where does the model run?",
     ("The executor owns the tensors and runs the model.",)),
    ("How does pagebus recover?|How does recovery work?|Explain recovery.|How does pagebus survive a crash?",
     ("The requester asks again: it sends the same request with the tokens that it has, and the stream "
      "goes on.",)),
    ("Does pagebus need a GPU?|Can pagebus run on a CPU?|Does pagebus run on the CPU?|Do I need a GPU?",
     ("No. pagebus runs on a GPU or on the CPU. I run on a CPU quite well.",)),
    ("Which models can pagebus serve?|What models does pagebus support?|Can pagebus run Llama?"
     "|Which models are supported?",
     ("pagebus serves Hugging Face checkpoints such as Llama, Qwen, Mistral, Gemma, Phi and gpt-oss.",)),
    ("How many hops are there to the first token?|How many hops does a request take?",
     ("There are three hops to the first token: Generate, Plan and Tokens.",)),
    ("Which messages are there?|What messages does pagebus send?|Name the messages of pagebus.",
     ("The main messages are Generate, Plan, Tokens and StepDone.",)),
    ("Does pagebus need a NATS server?|Where is the NATS server?|Do I have to install NATS?",
     ("pagebus serve starts its own NATS server, so there is nothing to install.",)),
    ("Is there a web page?|Is there a user interface?"
     "|Does pagebus have a UI?", ("Yes, open /ui on port 8000.",)),
    ("How do I see metrics?|Where are the metrics?|Does pagebus have metrics?",
     ("The gateway shows Prometheus metrics under /metrics.",)),
    ("How do I check that pagebus is healthy?|Is there a health check?|Where is the health check?",
     ("Ask /health: it says whether pagebus is alive and making progress.",)),
    ("How do I chat in the terminal?|Is there a chat command?|How can I chat with you?",
     ("Run pagebus chat in a terminal, or send messages to the API on port 8000.",)),
    ("How is pagebus different from vLLM?|Is pagebus like vLLM?"
     "|What is the difference between pagebus and vLLM?",
     ("pagebus does what vLLM does, but as separate services that meet on a message bus, and it survives "
      "the death "
      "of any of them.",)),
    ("What language is pagebus written in?"
     "|Is pagebus written in Python?", ("pagebus is written in Python.",)),
)

SMALL_TALK: tuple[Fact, ...] = (
    ("Hello|Hello!|Hi|Hi!|Hey|Hi there|Hello there!|Good morning|Good morning!|Good evening|Good day!"
     "|Greetings",
     ("Hello! How can I help you?", "Hi! What can I do for you?")),
    ("Who are you?|What are you?|What is your name?|Tell me about yourself.|What model are you?"
     "|Introduce yourself."
     "|Which model is this?|Who am I talking to?",
     ("I am the small model that comes with pagebus. I can add, subtract, spell, sort and tell stories.",)),
    ("What can you do?|How can you help me?|What do you know?|Help|help me|What are you good at?"
     "|Can you help me?",
     ("I can add and subtract, multiply up to 12 times 12, spell and reverse words, sort, count and tell "
      "stories.",)),
    ("Thanks|Thank you|Thank you!|Thanks a lot!|Many thanks.|Thank you very much.|thx|Great, thanks!",
     ("You are welcome!", "You are welcome. Anything else?")),
    ("How are you?|How are you today?|How do you do?|How is it going?|Are you well?|What's up?",
     ("I am fine, thank you. How are you?", "Very well, thank you. All my blocks are in order.")),
    ("Bye|Bye!|Goodbye|Goodbye!|See you|See you later!|Good night|Farewell.|I have to go.",
     ("Goodbye! Come back soon.", "Goodbye!")),
    ("Tell me a joke.|Tell me a joke|Do you know a joke?|Make me laugh.|Another joke, please."
     "|Say something funny.",
     ("Why did the token miss the bus? It was not in the batch.",
      "Why was the cache so calm? It had seen it all before.",
      "What does a scheduler do on holiday? It makes a plan.",
      "Why did the block go to school? To get its 16 tokens.",
      "Why do queues never laugh? They wait for the end.")),
    ("Who made you?|Who built you?|Who trained you?|Where do you come from?",
     ("I was trained with pagebus, on exercises and stories written for it.",)),
    ("How big are you?|How many parameters do you have?|Are you a large model?|How large are you?",
     ("I am very small: a few million parameters.",)),
    ("Are you human?|Are you a robot?|Are you alive?|Are you a machine?|Are you real?",
     ("I am a small language model, not a human.",)),
    ("Yes|Yes.|Ok|Okay|OK|Good|Fine|Great|Nice|Cool|Very good!", ("Good! What is next?",)),
    ("No|No.|Nothing|No, thanks.|Not really.", ("All right. I am here when you need me.",)),
    ("I am fine|I am fine, thanks.|I'm good|I am happy.", ("I am glad to hear it.",)),
    ("I am sad.|I am tired.|I feel bad."
     "|I am bored.", ("I am sorry to hear that. Shall I tell you a story?",)),
    ("test|Test|This is a test.|Testing|ping|Ping", ("I am here and I am working.",)),
    ("Say hello.|Say hello!|Say hello|Say hi.|Please say hello.", ("Hello!",)),
    ("Say yes.|Answer yes.|Say yes", ("Yes.",)),
    ("Sing a song.|Sing me a song."
     "|Can you sing?", ("La la la, the tokens go by, la la la, to the bus in the sky.",)),
    ("Write a poem.|Write a haiku.|Tell me a poem.|Do you know a poem?|A poem, please.",
     ("A token waits in line,\na block is free at last,\nthe bus arrives on time,\nand words go flying "
      "past.",)),
    ("What is the capital of France?|Who was the first king of England?|What is the weather like?"
     "|What day is it?"
     "|Translate this into German.|Write a program.|Who won the match?|What time is it?|What is love?"
     "|What is the meaning of life?|How far is the moon?|Who wrote this book?|Explain quantum physics."
     "|What is the capital of Italy?|Who is the president?|How old is the sun?|What should I cook?"
     "|Where is my key?|What is the best film?|Why is the sky blue?|Who invented the telephone?",
     ("I do not know that: I am a very small model. Ask me for a sum, a word to spell, or a story.",)),
    ("What colour is the sky?|What color is the sky?", ("The sky is blue.",)),
    ("How many days are in a week?|How many days has a week?", ("A week has 7 days.",)),
    ("What are the days of the week?|Name the days of the week.|List the days of the week.",
     ("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",)),
    ("What are the months?|Name the months of the year.|List the months.",
     ("January, February, March, April, May, June, July, August, September, October, November, December.",)),
    ("Say the alphabet.|What is the alphabet?|List the letters of the alphabet.|Recite the alphabet.",
     ("a b c d e f g h i j k l m n o p q r s t u v w x y z",)),
)

SYSTEM_MESSAGES = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a helpful, honest assistant.",
    "You are pagebus.", "You are the bundled model of pagebus.", "Answer briefly.", "Be brief.", "Be kind.",
    "You are a friendly teacher.", "You are a calculator.", "Answer the question.", "Be concise and polite.",
    "You are a careful assistant. Answer in one line.", "You love stories.", "Help the user.",
    "You are a small language model.", "Follow the instructions of the user.", "You are an expert in "
    "mathematics.",
)
