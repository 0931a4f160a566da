//! A Rust source as the house rules see it: comments and literals blanked out, test modules left
//! away, functions and uses found. Not a parser: enough for code that rustfmt has been over.

/// One file.
pub struct Source {
    pub path: String,
    pub text: String,
    /// As `text`, line for line, without what comments, strings and test modules say.
    code: String,
}

/// A function that has a body.
pub struct Function {
    pub name: String,
    /// Where it begins, from 1.
    pub line: usize,
    /// From its `fn` to its closing brace.
    pub lines: usize,
    /// Without `self`.
    pub parameters: usize,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Source {
        let mut code = without_tests(&blank(text));
        // A file that its parent declares under cfg(test) is test code as a whole.
        if path.ends_with("tests.rs") {
            code = code.replace(|c: char| c != '\n', " ");
        }
        Source {
            path: path.to_owned(),
            text: text.to_owned(),
            code,
        }
    }

    /// Lines (from 1) on which `word` stands by itself in code.
    pub fn lines_with_word(&self, word: &str) -> Vec<usize> {
        let places = words(&self.code, word);
        let mut lines: Vec<usize> = places.map(|at| line_of(&self.code, at)).collect();
        lines.dedup();
        lines
    }

    /// Lines (from 1) on which `word` stands in code, with the word or sign behind it.
    pub fn followers_of(&self, word: &str) -> Vec<(usize, String)> {
        let follower = |at: usize| {
            let rest = self.code[at + word.len()..].trim_start();
            let name = identifier(rest);
            let sign = || rest.chars().take(1).collect();
            (
                line_of(&self.code, at),
                if name.is_empty() { sign() } else { name },
            )
        };
        words(&self.code, word).map(follower).collect()
    }

    /// Whether `mark` stands in a comment on `line` or up to `reach` lines above.
    pub fn comment_near(&self, line: usize, reach: usize, mark: &str) -> bool {
        let first = line.saturating_sub(reach + 1);
        let near = self.text.lines().skip(first).take(line - first);
        let mut comments = near.filter_map(|l| l.split_once("//").map(|(_, comment)| comment));
        comments.any(|comment| comment.contains(mark))
    }

    /// Modules named after `crate::`, with the line.
    pub fn crate_uses(&self) -> Vec<(usize, String)> {
        let mut uses = Vec::new();
        for at in words(&self.code, "crate") {
            let Some(rest) = self.code[at..].strip_prefix("crate::") else {
                continue;
            };
            let line = line_of(&self.code, at);
            let names = match rest.strip_prefix('{') {
                Some(group) => group_heads(group),
                None => vec![identifier(rest)],
            };
            uses.extend(names.into_iter().map(|name| (line, name)));
        }
        uses
    }

    pub fn functions(&self) -> Vec<Function> {
        words(&self.code, "fn")
            .filter_map(|at| self.function(at))
            .collect()
    }

    fn function(&self, at: usize) -> Option<Function> {
        let rest = &self.code[at..];
        let name = identifier(rest[2..].trim_start());
        // "fn(u8) -> u8" is a type.
        if name.is_empty() {
            return None;
        }
        let (open, parameters) = parameters(rest)?;
        let body = open + rest[open..].find(['{', ';'])?;
        let body = skip_array_length(rest, body)?;
        if rest.as_bytes()[body] == b';' {
            return None;
        }
        let end = body + matching(&rest[body..])?;
        let line = line_of(&self.code, at);
        Some(Function {
            name,
            line,
            lines: line_of(&self.code, at + end) - line + 1,
            parameters,
        })
    }
}

/// "-> [u8; 4] {": the semicolon inside brackets ends no declaration.
fn skip_array_length(rest: &str, mut at: usize) -> Option<usize> {
    while rest.as_bytes()[at] == b';' {
        let before = &rest[..at];
        if before.matches('[').count() == before.matches(']').count() {
            return Some(at);
        }
        at += 1 + rest[at + 1..].find(['{', ';'])?;
    }
    Some(at)
}

/// The byte after a function's closing parenthesis, and how many parameters it takes.
fn parameters(rest: &str) -> Option<(usize, usize)> {
    let open = parameter_list(rest)?;
    let (mut depth, mut count, mut any, mut has_self) = (0usize, 0, false, false);
    let bytes = rest.as_bytes();
    for (index, &byte) in bytes.iter().enumerate().skip(open) {
        let arrow = byte == b'>' && bytes[index - 1] == b'-';
        match byte {
            b'(' | b'[' | b'{' | b'<' => depth += 1,
            b'>' if arrow => {}
            b')' | b']' | b'}' | b'>' => depth = depth.saturating_sub(1),
            b',' if depth == 1 => {
                count += usize::from(any);
                any = false;
                continue;
            }
            _ => {}
        }
        if depth == 0 {
            count += usize::from(any);
            return Some((index + 1, count - usize::from(has_self)));
        }
        if index > open && !byte.is_ascii_whitespace() {
            any = true;
        }
        has_self |= depth == 1
            && count == 0
            && rest[index..].starts_with("self")
            && !rest[index..].starts_with("self_");
    }
    None
}

/// The parenthesis that opens the parameters, behind generics of any depth.
fn parameter_list(rest: &str) -> Option<usize> {
    let bytes = rest.as_bytes();
    let mut depth = 0usize;
    for (index, &byte) in bytes.iter().enumerate() {
        match byte {
            b'<' => depth += 1,
            b'>' if bytes[index - 1] != b'-' => depth = depth.saturating_sub(1),
            b'(' if depth == 0 => return Some(index),
            _ => {}
        }
    }
    None
}

/// Offset of the bracket that closes the one at the start.
fn matching(text: &str) -> Option<usize> {
    let mut depth = 0usize;
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(index);
        }
    }
    None
}

/// First names of the entries of `a::b, c::{d, e}, f}`.
fn group_heads(group: &str) -> Vec<String> {
    let (mut depth, mut heads, mut entry) = (0usize, Vec::new(), String::new());
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.push(std::mem::take(&mut entry)),
            _ if depth == 0 => entry.push(c),
            _ => {}
        }
    }
    heads.push(entry);
    let names = heads.iter().map(|head| identifier(head.trim_start()));
    names.filter(|name| !name.is_empty()).collect()
}

fn identifier(text: &str) -> String {
    text.chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// Where `word` stands with no letter beside it. A macro's "!" is part of the word.
fn words<'t>(text: &'t str, word: &'t str) -> impl Iterator<Item = usize> + 't {
    let letter = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| {
            let after = text[at + word.len()..].chars().next();
            let before = text[..at].chars().next_back();
            !before.is_some_and(letter) && (word.ends_with('!') || !after.is_some_and(letter))
        })
}

/// Blanks every item under `#[cfg(test)]` that has a body.
fn without_tests(code: &str) -> String {
    let mut kept = code.to_owned();
    while let Some(at) = kept.find("#[cfg(test)]") {
        let rest = &kept[at..];
        let end = rest.find(['{', ';']).map_or(rest.len(), |open| {
            let closing = matching(&rest[open..]).map_or(rest.len(), |end| open + end + 1);
            if rest[open..].starts_with('{') {
                closing
            } else {
                open + 1
            }
        });
        let blanked = blank_of(&rest[..end]);
        kept.replace_range(at..at + end, &blanked);
    }
    kept
}

fn blank_of(text: &str) -> String {
    text.bytes()
        .map(|b| if b == b'\n' { '\n' } else { ' ' })
        .collect()
}

/// Comments, strings and characters turned to blanks, byte for byte; lines stay.
fn blank(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skipped = literal_length(rest, out.chars().next_back());
        if skipped > 0 {
            out += &blank_of(&rest[..skipped]);
            rest = &rest[skipped..];
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    out
}

/// Bytes of the comment, string or character that begins here; 0 = code.
fn literal_length(rest: &str, before: Option<char>) -> usize {
    let whole = |end: Option<usize>| end.unwrap_or(rest.len());
    if rest.starts_with("//") {
        return whole(rest.find('\n'));
    }
    if rest.starts_with("/*") {
        return whole(rest.find("*/").map(|at| at + 2));
    }
    if rest.starts_with('"') {
        return quoted(rest, '"');
    }
    let in_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let raw = rest
        .strip_prefix("br")
        .or(rest.strip_prefix('r'))
        .filter(|_| !in_word);
    if let Some(raw) = raw {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let begin = rest.len() - raw.len() + hashes + 1;
            return whole(
                rest[begin..]
                    .find(&close)
                    .map(|at| begin + at + close.len()),
            );
        }
    }
    if rest.starts_with('\'') && is_char(rest) {
        return quoted(rest, '\'');
    }
    0
}

/// 'a' and '\n' are characters, 'a in a type is a lifetime.
fn is_char(rest: &str) -> bool {
    let mut chars = rest.chars().skip(1);
    match chars.next() {
        Some('\\') => true,
        Some(_) => chars.next() == Some('\''),
        None => false,
    }
}

fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    rest.len()
}

#[test]
fn what_is_said_is_not_code() {
    let text = "let a = \"fn x() {\"; // fn y() {\nlet b = r#\"\"{\"#; let c = '{'; let d: &'a u8 = b'\\'';";
    let code = blank(text);
    assert_eq!(code.len(), text.len());
    assert_eq!(code.lines().count(), 2);
    assert!(!code.contains(['{', '"', '(']), "{code}");
    assert!(code.contains("&'a u8"), "{code}");
}

#[test]
fn functions_are_measured_from_head_to_brace() {
    let text = "trait T { fn none(&self); }\nfn array() -> [u8; 4] {\n    [0; 4]\n}\ntype F = fn(u8) -> u8;\nimpl X {\n    fn own(\n        &mut self,\n        x: HashMap<u8, u8>,\n    ) -> u8\n    where\n        u8: Copy,\n    {\n        let f = |a: u8, b: u8| a;\n        1\n    }\n}";
    let source = Source::new("src/x.rs", text);
    let found: Vec<_> = source
        .functions()
        .into_iter()
        .map(|f| (f.name, f.line, f.lines, f.parameters))
        .collect();
    assert_eq!(
        found,
        [("array".to_owned(), 2, 3, 0), ("own".to_owned(), 7, 10, 1)]
    );
}

#[test]
fn test_code_is_left_away_and_only_that() {
    let text = "#[cfg(test)]\n#[path = \"x.rs\"]\nmod tests;\nfn a() {}\n#[cfg(test)]\nmod more {\n    fn b() {}\n}\nfn c() {}";
    let source = Source::new("src/x.rs", text);
    let names: Vec<_> = source
        .functions()
        .into_iter()
        .map(|f| (f.name, f.line))
        .collect();
    assert_eq!(names, [("a".to_owned(), 4), ("c".to_owned(), 9)]);
    assert!(Source::new("src/x_tests.rs", text).functions().is_empty());
}
