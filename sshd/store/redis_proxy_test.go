package store_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// A fate is what becomes of one command on its way through a redisProxy.
type fate int

const (
	passes  fate = iota
	unheard      // the connection is cut, and Redis never hears of it
	unsaid       // Redis does it, and the connection is cut before its answer
	late         // the connection is cut, and Redis does it when release is called
	fakes        // Redis does not know it: it is answered ":1", or for WAITAOF as 7.2 would
)

// A redisProxy stands between a store and a redisServer and knows where commands begin and
// end.
type redisProxy struct {
	t    testing.TB
	to   string
	l    net.Listener
	plan func(words []string) fate // may be called concurrently with itself

	mu    sync.Mutex // guards the following
	kept  [][]byte   // commands that are late
	conns map[net.Conn]bool
	wg    sync.WaitGroup
}

// proxied starts one; it ends with the test.
func (s *redisServer) proxied(plan func(words []string) fate) *redisProxy {
	l, err := net.Listen("unix", filepath.Join(s.Dir(), "p"+newName()))
	if err != nil {
		s.t.Fatal(err)
	}
	p := &redisProxy{t: s.t, to: s.Socket(), l: l, plan: plan, conns: map[net.Conn]bool{}}
	p.wg.Go(p.accept)
	s.t.Cleanup(func() {
		l.Close()
		p.mu.Lock()
		for c := range p.conns {
			c.Close()
		}
		p.conns = nil
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

func (p *redisProxy) url(params ...string) string {
	return "unix://" + p.l.Addr().String() + "?" + strings.Join(params, "&")
}

func (p *redisProxy) accept() {
	for {
		c, err := p.l.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		if p.conns == nil {
			c.Close()
		} else {
			p.conns[c] = true
			p.wg.Go(func() { p.serve(c) })
		}
		p.mu.Unlock()
	}
}

func (p *redisProxy) serve(c net.Conn) {
	defer c.Close()
	up, err := net.Dial("unix", p.to)
	if err != nil {
		return
	}
	defer up.Close()
	in, back := bufio.NewReader(c), bufio.NewReader(up)
	for {
		raw, words, err := readCommand(in)
		if err != nil {
			return
		}
		switch p.plan(words) {
		case passes:
			if _, err := up.Write(raw); err != nil {
				return
			}
			reply, err := readReply(back, nil)
			if err != nil {
				return
			}
			c.Write(reply)
		case unheard:
			return
		case unsaid:
			up.Write(raw)
			readReply(back, nil)
			return
		case late:
			p.mu.Lock()
			p.kept = append(p.kept, raw)
			p.mu.Unlock()
			return
		case fakes:
			if strings.EqualFold(words[0], "WAITAOF") {
				c.Write([]byte("*2\r\n:" + words[1] + "\r\n:0\r\n"))
			} else {
				c.Write([]byte(":1\r\n"))
			}
		}
	}
}

// release lets Redis have what is late, and returns how much that was.
func (p *redisProxy) release() int {
	p.mu.Lock()
	kept := p.kept
	p.kept = nil
	p.mu.Unlock()
	for _, raw := range kept {
		up, err := net.Dial("unix", p.to)
		if err != nil {
			p.t.Error(err)
			return 0
		}
		up.Write(raw)
		if _, err := readReply(bufio.NewReader(up), nil); err != nil {
			p.t.Error(err)
		}
		up.Close()
	}
	return len(kept)
}

// readCommand reads an array of texts, as clients send them.
func readCommand(r *bufio.Reader) (raw []byte, words []string, err error) {
	line, err := r.ReadBytes('\n')
	if err != nil {
		return nil, nil, err
	}
	n, err := number(line, '*')
	for raw = line; err == nil && n > 0; n-- {
		var size int
		if line, err = r.ReadBytes('\n'); err != nil {
			break
		}
		if size, err = number(line, '$'); err != nil {
			break
		}
		body := make([]byte, size+2)
		if _, err = io.ReadFull(r, body); err == nil {
			raw = append(append(raw, line...), body...)
			words = append(words, string(body[:size]))
		}
	}
	return raw, words, err
}

func number(line []byte, mark byte) (int, error) {
	if len(line) < 4 || line[0] != mark {
		return 0, errors.New("not what clients send: " + string(line))
	}
	return strconv.Atoi(string(line[1 : len(line)-2]))
}

// readReply reads one answer of RESP 2 or 3 and adds it to b.
func readReply(r *bufio.Reader, b []byte) ([]byte, error) {
	line, err := r.ReadBytes('\n')
	if err != nil || len(line) < 3 {
		return b, err
	}
	b = append(b, line...)
	n, _ := strconv.Atoi(string(line[1 : len(line)-2]))
	switch line[0] {
	case '$', '=', '!':
		if n >= 0 {
			body := make([]byte, n+2)
			_, err = io.ReadFull(r, body)
			b = append(b, body...)
		}
	case '%':
		n *= 2
		fallthrough
	case '*', '~', '>':
		for ; err == nil && n > 0; n-- {
			b, err = readReply(r, b)
		}
	}
	return b, err
}

// writes reports whether a command is the script that commits, sent either way.
func commits(words []string) bool { return isScript(words, commitKeys) }

// settles reports whether a command is the script that settles.
func settles(words []string) bool { return isScript(words, settleKeys) }

// The scripts differ in what follows meta and log.
const (
	commitKeys = 6 // words of ARGV at least
	settleKeys = 4
)

func isScript(words []string, args int) bool {
	if len(words) < 5 || !strings.HasPrefix(strings.ToUpper(words[0]), "EVAL") || !strings.HasSuffix(words[3], ":meta") || !strings.HasSuffix(words[4], ":log") {
		return false
	}
	n, _ := strconv.Atoi(words[2])
	rest := len(words) - 3 - n
	if args == settleKeys {
		return n == 2 && rest == settleKeys
	}
	return rest >= commitKeys
}
