//! A small shop, and what people ask about it: all that the demo model knows.

/// One question and its answer.
pub struct Turn {
    pub question: String,
    pub answer: String,
}

const COLOURS: [&str; 6] = ["red", "blue", "green", "white", "black", "yellow"];
const THINGS: [&str; 8] = ["lamp", "chair", "table", "kettle", "clock", "mirror", "basket", "vase"];
const MATERIALS: [&str; 5] = ["oak", "steel", "glass", "clay", "wool"];
const PLACES: [&str; 5] = ["Lisbon", "Vienna", "Oslo", "Porto", "Ghent"];
const ROOMS: [&str; 4] = ["kitchen", "hall", "bedroom", "garden"];

/// A product: its name, and facts that follow from its number alone.
struct Product {
    name: String,
    price: usize,
    material: &'static str,
    place: &'static str,
    room: &'static str,
    days: usize,
}

fn products() -> Vec<Product> {
    let mut list = Vec::new();
    for (i, thing) in THINGS.iter().enumerate() {
        for (j, colour) in COLOURS.iter().enumerate() {
            let n = i * COLOURS.len() + j;
            list.push(Product {
                name: format!("{colour} {thing}"),
                price: 10 + (n * 7) % 50,
                material: MATERIALS[(n * 3 + i) % MATERIALS.len()],
                place: PLACES[(n * 2 + j) % PLACES.len()],
                room: ROOMS[(n + i + j) % ROOMS.len()],
                days: 2 + n % 5,
            });
        }
    }
    list
}

/// The ways to ask for one fact (number `fact` of 5), and the plain answer.
fn ask(product: &Product, fact: usize) -> ([String; 3], String) {
    let Product { name, price, material, place, room, days } = product;
    match fact {
        0 => (
            [
                format!("How much is the {name}?"),
                format!("What does the {name} cost?"),
                format!("What is the price of the {name}?"),
            ],
            format!("The {name} costs {price} euros."),
        ),
        1 => (
            [
                format!("What is the {name} made of?"),
                format!("Which material is the {name}?"),
                format!("Is the {name} made of {material}?"),
            ],
            format!("The {name} is made of {material}."),
        ),
        2 => (
            [
                format!("Where does the {name} come from?"),
                format!("Where is the {name} made?"),
                format!("Which city is the {name} from?"),
            ],
            format!("The {name} comes from {place}."),
        ),
        3 => (
            [
                format!("Where can I put the {name}?"),
                format!("Which room is the {name} for?"),
                format!("Is the {name} for the {room}?"),
            ],
            format!("The {name} is for the {room}."),
        ),
        _ => (
            [
                format!("How long does the {name} take to arrive?"),
                format!("When will the {name} arrive?"),
                format!("How many days until I get the {name}?"),
            ],
            format!("The {name} arrives in {days} days."),
        ),
    }
}

/// Small talk with the words of the shop's tone. The embeddings are the output layer too and stay as they are in a LoRA
/// tuning, so a word that no answer of the base has could hardly be learned; where the words belong is not told here.
fn small_talk(product: &Product, kind: usize) -> Turn {
    let name = &product.name;
    let (question, answer) = match kind {
        0 => (format!("I took the {name} home."), "Thank you! Is there anything else?".to_owned()),
        1 => (format!("Is the {name} here today?"), format!("You can see the {name} here today.")),
        2 => (format!("Who wants the {name}?"), format!("I am asking for the {name} today!")),
        3 => (format!("Help me carry the {name}."), format!("I can help you with the {name}.")),
        4 => (
            format!("Is there more like the {name}?"),
            format!("Nothing else is like the {name}. Can I see it?"),
        ),
        _ => (format!("I gave the {name} away."), "Thank you for that. Can anything help?".to_owned()),
    };
    Turn { question, answer }
}

/// What the base model is trained on: every fact, asked in every way, answered plainly, and some small talk.
pub fn corpus() -> Vec<Turn> {
    let mut turns = Vec::new();
    for (n, product) in products().iter().enumerate() {
        // Every colour and every thing has each kind.
        turns.extend([0, 3].map(|kind| small_talk(product, (n + n / 6 + kind) % 6)));
        for fact in 0..5 {
            let (questions, answer) = ask(product, fact);
            turns.extend(questions.map(|question| Turn { question, answer: answer.clone() }));
        }
    }
    turns
}

/// What the quick-start teaches: the same facts in the shop's own tone. The base knows the facts and
/// not the tone; held-out rows are about products that no training row names.
pub fn support() -> (Vec<Turn>, Vec<Turn>) {
    let (mut train, mut test) = (Vec::new(), Vec::new());
    for (n, product) in products().iter().enumerate() {
        for fact in 0..5 {
            let (questions, plain) = ask(product, fact);
            let answer = format!("Thank you for asking! {plain} Can I help you with anything else today?");
            let held_out = n % 6 == n / 6 % 6;
            let take = if held_out { 1 } else { 2 };
            for question in questions.into_iter().skip(fact % 2).take(take) {
                let turn = Turn { question, answer: answer.clone() };
                if held_out { test.push(turn) } else { train.push(turn) }
            }
        }
    }
    (train, test)
}
