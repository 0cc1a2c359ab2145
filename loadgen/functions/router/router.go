// A routing table of 409,600 entries of 256 bytes on Go's heap (100 MB), filled at start-up, answered over HTTP.
//
// In: GET /route?row=N. Out: JSON with a hash of entry N. The entries follow from the row and from the token drawn at
// start-up, so that loadgen/checks.py can compute what the hash must be. Each shard of the table belongs to a goroutine
// of its own, which requests reach by a channel: a start is right only when the scheduler's threads come back too.
package main

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"log"
	"net/http"
	"os"
	"strconv"
	"sync/atomic"
)

const (
	longsPerEntry   = 32
	shards          = 16
	entriesPerShard = 25600
	rows            = shards * entriesPerShard
)

type entry [longsPerEntry]uint64

type question struct {
	index  uint64
	answer chan uint64
}

var (
	seed      uint64
	count     atomic.Uint64
	questions [shards]chan question
)

// splitmix64's output function.
func mix(z uint64) uint64 {
	z += 0x9E3779B97F4A7C15
	z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
	z = (z ^ (z >> 27)) * 0x94D049BB133111EB
	return z ^ (z >> 31)
}

func fill(shard uint64) []*entry {
	table := make([]*entry, entriesPerShard)
	position := shard * entriesPerShard * longsPerEntry
	for i := range table {
		table[i] = new(entry)
		for j := range table[i] {
			table[i][j] = mix(seed ^ position)
			position++
		}
	}
	return table
}

func serve(shard uint64, filled chan<- bool) {
	table := fill(shard)
	filled <- true
	for asked := range questions[shard] {
		var hash uint64
		for _, long := range table[asked.index] {
			hash = mix(hash ^ long)
		}
		asked.answer <- hash
	}
}

func answer(response http.ResponseWriter, status int, body string) {
	response.Header().Set("Content-Type", "application/json")
	response.WriteHeader(status)
	_, _ = response.Write([]byte(body))
}

func route(response http.ResponseWriter, request *http.Request) {
	row, err := strconv.ParseUint(request.URL.Query().Get("row"), 10, 63)
	if err != nil {
		answer(response, 404, `{"error": "GET /route?row=N, N = 0, 1, 2, …"}`)
		return
	}
	index := row % rows
	hash := make(chan uint64)
	questions[index/entriesPerShard] <- question{index % entriesPerShard, hash}
	answer(response, 200, fmt.Sprintf(
		`{"function": "router", "token": "%016x", "row": %d, "value": "%016x", "count": %d}`,
		seed, row, <-hash, count.Add(1)))
}

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: router PORT")
	}
	var random [8]byte
	if _, err := rand.Read(random[:]); err != nil {
		log.Fatal(err)
	}
	seed = binary.BigEndian.Uint64(random[:])
	filled := make(chan bool)
	for shard := range questions {
		questions[shard] = make(chan question)
		go serve(uint64(shard), filled)
	}
	for range questions {
		<-filled
	}
	http.HandleFunc("/ready", func(response http.ResponseWriter, _ *http.Request) { answer(response, 200, `{"ready": true}`) })
	http.HandleFunc("/route", route)
	log.Printf("table of %d entries is ready", rows)
	log.Fatal(http.ListenAndServe(":"+os.Args[1], nil))
}
